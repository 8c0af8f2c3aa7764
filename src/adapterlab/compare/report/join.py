"""Several comparisons as one: possible where they were judged on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adapterlab.compare.results import Comparison, Exam, Interval
from adapterlab.compare.statistics import Sheets, interval
from adapterlab.compare.summary import summarise


def alike(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    """Group comparisons by what they were judged on: losses and scores on other data have nothing in common."""
    groups: dict[Any, list[Comparison]] = {}
    for comparison in comparisons:
        data = comparison.data
        key = (comparison.judge, data.get("fingerprint"), data.get("eval_rows"))
        groups.setdefault(key, []).append(comparison)
    return list(groups.values())


def joined_label(comparison: Comparison, label: str) -> str:
    """Return the name of a method among those of several comparisons."""
    return f"{comparison.name}: {label}"


def join(members: Sequence[Comparison]) -> Comparison:
    """Put comparisons that were judged on the same rows into one, with ranks and tests over all their methods.

    Args:
        members: at least one; a lone one is returned as it is.
    """
    if len(members) == 1:
        return members[0]
    runs = [run.model_copy(update={"label": joined_label(c, run.label)}) for c in members for run in c.runs]
    first, level = members[0], min(c.level for c in members)
    whole = first.model_copy(
        update={"name": ", ".join(c.name for c in members), "runs": runs, "level": level, "recommendation": None}
    )
    facts = {key: getattr(whole, key) for key in ("name", "started", "updated", "finished", "config")}
    ranked = summarise(runs, judge=whole.judge, level=level, **facts)
    return whole.model_copy(update={"differences": ranked.differences, "standings": ranked.standings})


def exam_interval(exams: Sequence[Exam], seeds: Sequence[int], judge: str) -> Interval | None:
    """Return the 95 % interval of a mean score or loss, as the ranking has it; None where rows differ.

    Args:
        exams: of one method, one for each seed.
        seeds: theirs.
        judge: "score" or "loss".
    """
    marks = [exam.marks(judge) for exam in exams]
    if any(weights != marks[0][1] for _, weights in marks) or not marks[0][0]:
        return None
    values = np.array([given for given, _ in marks], dtype=float)
    return interval(Sheets({"": values}, {"": seeds}, np.array(marks[0][1], dtype=float)), "")
