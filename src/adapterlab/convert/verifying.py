"""Comparing a merged model with the live one, on token rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adapterlab.engine.modes import evaluating
from adapterlab.errors import DataError
from adapterlab.evaluate.generation import window_of
from adapterlab.foreign.model import is_encoder_decoder

Row = Mapping[str, Any]
IGNORED = -100
LONGEST = 256  # tokens of a sample text that are used

# Prose, dialogue, code, figures and other languages: enough to see that two models compute the same.
TEXTS = (
    "The river rose during the night, and by morning the lower fields were under water.",
    "Question: A box holds 12 eggs. How many eggs are in 7 boxes?\nAnswer: 12 * 7 = 84, so there are 84 eggs.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "- Could you send me the report by Friday?\n- Of course, I will finish it on Thursday evening.",
    "In 1911 the expedition reached 86° south; the temperature that day was -31.5 °C.",
    "El tren sale a las ocho y llega al mediodía. Der Zug fährt um acht Uhr ab.",
)


@dataclass(frozen=True)
class Verification:
    """How far a merged model is from the live one.

    Attributes:
        rows: number of samples.
        tokens: positions compared.
        max_difference: of the logits, absolute.
        mean_difference: likewise.
        agreement: share of positions with the same likeliest token.
        spread: standard deviation of the live logits, as a measure for the differences.
        effect: mean difference between the live model and its base: what the adapter does.
        perplexity_live: of the live model on the samples, or None when they carry no labels.
        perplexity_merged: likewise.
    """

    rows: int
    tokens: int
    max_difference: float
    mean_difference: float
    agreement: float
    spread: float
    effect: float
    perplexity_live: float | None
    perplexity_merged: float | None

    @property
    def lost(self) -> bool:
        """Whether the merged model is about as far from the live one as the base is, and not by mere rounding."""
        return not self.mean_difference <= max(0.5 * self.effect, 1e-3 * self.spread)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return asdict(self)


def token_rows(texts: Sequence[str], tokenizer: Any, model: Any) -> list[dict[str, list[int]]]:
    """Turn texts into rows whose tokens are all labels; long texts are cut.

    Raises:
        DataError: no text has two tokens.
    """
    limit = min(LONGEST, window_of(model, tokenizer) or LONGEST)
    ids = [list(tokenizer(text)["input_ids"])[:limit] for text in texts]
    rows = [{"input_ids": row, "labels": row} for row in ids if len(row) > 1]
    if not rows:
        raise DataError(f"None of the {len(texts)} sample texts has two tokens. Give longer ones, or leave them out.")
    return rows


def compare(host: Any, merged: Any, rows: Sequence[Row]) -> Verification:
    """Compare the live model of a host with a merged one, row by row.

    Args:
        host: whose live adapters were merged.
        merged: the model made of it.
        rows: arguments of the model, without batch dimension.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    largest, tokens = 0.0, 0
    with evaluating(host.model), evaluating(merged):
        for row in rows:
            ours, our_loss, count = _run(host.model, row)
            theirs, their_loss, _ = _run(merged, row)
            with host.using():
                base, _, _ = _run(host.model, row)
            difference = (ours - theirs).abs()
            # A NaN must reach the result, and max() would drop it.
            largest = max(largest, float(difference.max())) if not bool(difference.isnan().any()) else math.nan
            tokens += ours.shape[:-1].numel()
            found: dict[str, Any] = {
                "difference": difference.sum(), "effect": (ours - base).abs().sum(), "logits": ours.sum(),
                "squares": ours.square().sum(), "same": (ours.argmax(-1) == theirs.argmax(-1)).sum(),
                "count": ours.numel(), "live": our_loss * count, "merged": their_loss * count, "labels": count,
            }  # fmt: skip
            for key, value in found.items():
                sums[key] += float(value)
    n, labels = sums["count"], sums["labels"]
    return Verification(
        rows=len(rows),
        tokens=tokens,
        max_difference=largest,
        mean_difference=sums["difference"] / n,
        agreement=sums["same"] / tokens,
        spread=math.sqrt(max(0.0, sums["squares"] / n - (sums["logits"] / n) ** 2)),
        effect=sums["effect"] / n,
        perplexity_live=_perplexity(sums["live"] / labels) if labels else None,
        perplexity_merged=_perplexity(sums["merged"] / labels) if labels else None,
    )


def _run(model: Any, row: Row) -> tuple[Tensor, float, int]:
    """Logits in float32, mean loss, and the number of labels it is the mean of."""
    device = next(model.parameters()).device
    out = model(**{key: torch.as_tensor(value, device=device)[None] for key, value in row.items()})
    labels = torch.as_tensor(row["labels"]) if "labels" in row else torch.full((1,), IGNORED)
    shifted = labels if is_encoder_decoder(model) else labels[1:]
    count = int((shifted != IGNORED).sum())
    return out.logits.float(), float(out.loss) if count else 0.0, count


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond, a float has no room
