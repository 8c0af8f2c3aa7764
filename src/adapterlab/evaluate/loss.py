"""The mean token loss of a set of rows, exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapterlab.data.batching import placed
from adapterlab.engine.attention import fast_attention
from adapterlab.engine.loss import Loss
from adapterlab.engine.modes import evaluating
from adapterlab.engine.packing import choose
from adapterlab.errors import DataError
from adapterlab.evaluate.lengths import by_length
from adapterlab.foreign.model import input_device

Row = Mapping[str, Sequence[int]]


def evaluate_loss(
    model: Any,
    rows: Sequence[Row],
    collator: Callable[[Sequence[Row]], Mapping[str, Any]],
    batch_size: int = 16,
    *,
    packing: bool | None = None,
) -> tuple[float, int]:
    """Compute the mean cross-entropy over all tokens that bear a label, whatever rows and batches they are in.

    Args:
        model: a language model of transformers, with or without adapters.
        rows: rows of `adapterlab.data.encode`.
        collator: makes a batch of rows.
        batch_size: rows computed at once; the result does not depend on it beyond rounding.
        packing: put rows behind each other instead of padding them; None: whenever it is possible.

    Returns:
        The loss in nats per token, and the number of tokens.

    Raises:
        DataError: no token bears a label.
        ConfigError: packing is asked for and impossible.
    """
    device = input_device(model)
    order = by_length(rows)  # rows of like length share a batch: little padding
    total, tokens = 0.0, 0
    collate, _ = choose(model, collator, len(rows[order[0]]["input_ids"]) if order else 0, packing)
    with evaluating(model), fast_attention(model):
        loss = Loss(model)
        for start in range(0, len(order), batch_size):
            batch = placed(collate([rows[i] for i in order[start : start + batch_size]]), device)
            count = loss.tokens(batch)
            if count:
                total += float(loss(batch, total=1))
                tokens += count
    if not tokens:
        raise DataError(
            f"None of the {len(rows)} evaluation rows has a token with a label, so there is no loss. "
            "Check data.train_on and data.max_length."
        )
    return total / tokens, tokens
