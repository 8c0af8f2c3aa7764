"""Scoring generated answers: right or wrong by text, by final number, or by a task's verifier; and Wilson intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from statistics import NormalDist

from adapterlab.data.config import DataConfig
from adapterlab.data.formats import Example
from adapterlab.data.splits import Splits
from adapterlab.data.tasks import make_task
from adapterlab.errors import DataError

_SHORT = 40  # characters of the longest reference that `auto` compares as text

# A minus sign counts only where nothing stands before it that could be subtracted from.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}.])[-−])?[$€£]?(?P<digits>\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
)


@dataclass(frozen=True)
class Scorer:
    """Compares a generated answer with its example's reference.

    Attributes:
        name: "exact", "number" or "verifier".
        compare: from (answer text, example) to a score in [0, 1].
    """

    name: str
    compare: Callable[[str, Example], float]

    def __call__(self, answer_text: str, example: Example) -> float:
        """Score one answer.

        Args:
            answer_text: generated text without special tokens.
            example: the example it answers.

        Returns:
            1.0 for a right answer, else 0.0.
        """
        return self.compare(answer_text, example)


def number_in(text: str) -> Decimal | None:
    """Find the final number of a text.

    Args:
        text: an answer. After a last `####` the first number counts, else the last number of the text. Thousands
            separators, currency signs and a full stop after the number are ignored.

    Returns:
        The number, or None when there is none.
    """
    _, marker, marked = text.rpartition("####")
    found = list(_NUMBER.finditer(marked if marker else text))
    if not found:
        return None
    match = found[0 if marker else -1]
    value = Decimal(match["digits"].replace(",", ""))
    return -value if match["sign"] else value


def _exact(text: str, example: Example) -> float:
    return float(_normal(text) == _normal(str(example.answer)))


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def _number(text: str, example: Example) -> float:
    got = number_in(text)
    return float(got is not None and got == number_in(str(example.answer)))


def _verifier(cfg: DataConfig) -> Callable[[str, Example], float]:
    task = make_task(str(cfg.task), cfg.task_args, seed=cfg.seed, size=1)

    def verify(text: str, example: Example) -> float:
        try:
            # Verifiers give small credit for trying (0.01) or for the form; only full credit is a right answer.
            return float(task.score_answer(text.strip(), example.meta["entry"]) >= 1.0)
        except Exception:  # a verifier that parses the answer may fail on any text a model writes
            return 0.0

    return verify


def scorer_for(cfg: DataConfig, splits: Splits) -> Scorer | None:
    """Choose how to score generated answers.

    "auto" takes the verifier for a task, numbers when every reference is one, text when every reference is short and
    on one line, and else nothing: long free text has no single right answer, so only the loss tells.

    Args:
        cfg: its `scorer` and, for a verifier, its task.
        splits: the examples to be scored.

    Returns:
        The scorer, or None when answers are not scored.

    Raises:
        DataError: the scorer asked for does not fit the rows.
    """
    kind = _fitting_kind(cfg, splits) if cfg.scorer == "auto" else cfg.scorer
    if kind == "none":
        return None
    if kind == "verifier":
        if cfg.task is None:
            raise DataError(
                f"data.scorer=verifier needs a generated task, but the rows come from {splits.source}. "
                "Use data.scorer=exact or number, or set data.task."
            )
        return Scorer(kind, _verifier(cfg))
    for example in splits.eval:
        if example.answer is None or (kind == "number" and number_in(example.answer) is None):
            raise DataError(
                f"data.scorer={kind} needs {'a number' if kind == 'number' else 'a reference'} in every answer; "
                f"evaluation row {example.row} has {str(example.answer)[:60]!r}. "
                f"Use data.scorer={'exact or none' if example.answer is not None else 'none'}."
            )
    return Scorer(kind, _number if kind == "number" else _exact)


def _fitting_kind(cfg: DataConfig, splits: Splits) -> str:
    if cfg.task is not None:
        return "verifier"
    answers = [e.answer for e in splits.eval or splits.train]
    if any(a is None for a in answers):
        return "none"
    texts = [str(a).strip() for a in answers]
    if all(_NUMBER.fullmatch(t) for t in texts):
        return "number"
    return "exact" if all(len(t) <= _SHORT and "\n" not in t for t in texts) else "none"


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share, which stays within [0, 1] and is sound near its ends.

    Args:
        successes: how many were right (a sum of scores).
        n: how many were tried.
        confidence: coverage of the interval.

    Returns:
        Lower and upper end; (0, 1) when nothing was tried.

    Raises:
        ValueError: the counts or the confidence are impossible.
    """
    if not 0 <= successes <= n or not 0 < confidence < 1:
        raise ValueError(
            f"wilson needs 0 <= successes <= n and 0 < confidence < 1; received successes={successes}, n={n}, "
            f"confidence={confidence}"
        )
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)
