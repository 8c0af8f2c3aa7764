"""The mean token loss of a set of rows, exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from adapterlab.data.batching import placed
from adapterlab.engine.attention import fast_attention
from adapterlab.engine.loss import Loss
from adapterlab.engine.modes import evaluating
from adapterlab.engine.packing import choose
from adapterlab.errors import DataError
from adapterlab.evaluate.lengths import by_length
from adapterlab.foreign.model import input_device

Row = Mapping[str, Sequence[int]]


class Spread(Protocol):
    """How a model is spread over processes, as an evaluation sees it."""

    def device(self, model: Any) -> torch.device: ...  # where batches belong
    def passes(self, batches: int) -> int: ...  # that every process makes, if this one has so many batches
    def called(self, compute: Callable[[], Tensor]) -> Tensor: ...  # with the model's tensors at hand


def evaluate_loss(
    model: Any,
    rows: Sequence[Row],
    collator: Callable[[Sequence[Row]], Mapping[str, Any]],
    batch_size: int = 16,
    *,
    packing: bool | None = None,
    loss: Loss | None = None,
    spread: Spread | None = None,
) -> tuple[float, int]:
    """Compute the mean cross-entropy over all tokens that bear a label, whatever rows and batches they are in.

    Args:
        model: a language model of transformers, with or without adapters.
        rows: rows of `adapterlab.data.encode`.
        collator: makes a batch of rows.
        batch_size: rows computed at once; the result does not depend on it beyond rounding.
        packing: put rows behind each other instead of padding them; None: whenever it is possible.
        loss: of the model, if it was made already.
        spread: over processes that evaluate rows of their own, each as often as the others; None: one process.

    Returns:
        The loss in nats per token, and the number of tokens.

    Raises:
        DataError: no token bears a label.
        ConfigError: packing is asked for and impossible.
    """
    device = input_device(model) if spread is None else spread.device(model)
    order = by_length(rows)  # rows of like length share a batch: little padding
    total, tokens = 0.0, 0
    collate, _ = choose(model, collator, len(rows[order[0]]["input_ids"]) if order else 0, packing)
    starts = [*range(0, len(order), batch_size)]
    surplus = 0 if spread is None else spread.passes(len(starts)) - len(starts)
    with evaluating(model), fast_attention(model):
        loss = loss or Loss(model)
        for i, start in enumerate(starts + [0] * surplus):
            batch = placed(collate([rows[j] for j in order[start : start + batch_size]]), device)
            count = loss.tokens(batch)
            if count or spread is not None:
                make = functools.partial(loss, batch, total=1)
                value = float(make() if spread is None else spread.called(make))
                total += value if count and i < len(starts) else 0.0
                tokens += count if i < len(starts) else 0
    if not tokens:
        raise DataError(
            f"None of the {len(rows)} evaluation rows has a token with a label, so there is no loss. "
            "Check data.train_on and data.max_length."
        )
    return total / tokens, tokens
