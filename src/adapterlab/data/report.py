"""Token rows, and what is said of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """What encoding did.

    Attributes:
        rows: rows that came out.
        dropped: rows left out because no trained token fits into the limit (`too_long="drop"`).
        truncated: rows cut at the limit that still train.
        tokens: tokens of all rows; for seq2seq those of the encoder.
        trained_tokens: tokens that carry a label.
        trained_share: trained tokens per token.
        max_length: longest row in tokens.
        mean_length: mean row length in tokens.
        limit: the most tokens a row may have.
        mask_by: "template markers", "prefix diffing", "whole text", or for seq2seq "decoder labels".
        template: "chat template", "plain text (turns on lines of their own, end token after answers)" or "none".
        unshown: fields of turns that the template does not show; what must not be missing is refused.
        unknown: tokens that stand for what the tokenizer has no word for.
        pending: rows that were not looked at yet; nothing above counts them.
    """

    rows: int
    dropped: int
    truncated: int
    tokens: int
    trained_tokens: int
    trained_share: float
    max_length: int
    mean_length: float
    limit: int
    mask_by: str
    template: str
    unshown: tuple[str, ...] = ()
    unknown: int = 0
    pending: int = 0

    def joined(self, other: Report) -> Report:
        """Return the report of two sets of rows that one template made."""
        rows, tokens, trained = (
            getattr(self, name) + getattr(other, name) for name in ("rows", "tokens", "trained_tokens")
        )
        return dataclasses.replace(
            self,
            rows=rows,
            dropped=self.dropped + other.dropped,
            truncated=self.truncated + other.truncated,
            tokens=tokens,
            trained_tokens=trained,
            trained_share=trained / max(1, tokens),
            max_length=max(self.max_length, other.max_length),
            mean_length=tokens / max(1, rows),
            unshown=tuple(dict.fromkeys(self.unshown + other.unshown)),
            unknown=self.unknown + other.unknown,
            pending=self.pending + other.pending,
        )


@dataclass(frozen=True)
class Encoded:
    """Token rows, each with `input_ids`, `labels` (-100 where nothing is trained) and what else the example brings.

    Attributes:
        rows: what was kept, in order.
        report: on the rows.
        kept: which of the examples each row is made of.
        cut: which of the examples lost their end at the limit.
    """

    rows: Sequence[dict[str, Any]]
    report: Report
    kept: Sequence[int]
    cut: Sequence[int] = ()
