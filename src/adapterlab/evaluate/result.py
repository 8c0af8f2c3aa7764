"""What an evaluation found."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Loss and score of one model on one set of examples.

    Attributes:
        loss: mean cross-entropy of the labelled tokens, in nats.
        tokens: number of those tokens.
        n: number of examples.
        correct: how many answers were right; None when answers are not scored.
        interval: 95 % Wilson interval of the score; None when answers are not scored.
        sources: the same of the examples of each source by itself, where there are several.
    """

    loss: float
    tokens: int
    n: int
    correct: int | None = None
    interval: tuple[float, float] | None = None
    sources: dict[str, Figures] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite when that is beyond floating point."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def score(self) -> float | None:
        """Share of right answers."""
        return None if self.correct is None else self.correct / self.n

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values, ready for JSON."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if not self.sources:
            del plain["sources"]
        return {**plain, "perplexity": self.perplexity, "score": self.score}


@dataclass(frozen=True, kw_only=True)
class Evaluation(Figures):
    """The figures of an adapted model, with what they were measured on and how the plain base does on the same.

    Attributes:
        target: what was evaluated.
        source: where the examples come from.
        left_out: examples that leave no room for an answer within the longest row, and were not asked.
        columns: names of the columns of the rows that are `used` and `unused`.
        scorer: name of the scorer, or None.
        why_no_score: the reason when answers are not scored, else "".
        max_new_tokens: longest answer allowed, in tokens; None when none were generated.
        seconds: wall time, loading not counted.
        answers: file with all answers, or None.
        samples: the first few answers, as they are in that file; their score is None where there is no scorer.
        base: figures of the base model with every adapter off, when asked for.
        fixed: answers that the base has wrong and the adapter right.
        broken: answers that the base has right and the adapter wrong.
    """

    target: str
    source: str
    left_out: int = 0
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    scorer: str | None
    why_no_score: str = ""
    max_new_tokens: int | None = None
    seconds: float
    answers: Path | None = None
    samples: tuple[dict[str, Any], ...] = ()
    base: Figures | None = None
    fixed: int | None = None
    broken: int | None = None


def _plain(value: Any) -> Any:
    if isinstance(value, Figures):
        return value.to_dict()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
