"""How the runs came about: with others on one base in one process, or each by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from adapterlab.compare.results import Comparison

_REASONS = 3  # that are told; comparison.json has all


def came_about(comparisons: Sequence[Comparison]) -> list[str]:
    """Say of each comparison how many runs shared a base and how many were alone, with the recorded reasons.

    Args:
        comparisons: each with a line, unless nothing was trained in it yet; named where there are several.
    """
    lines = [(c.name, _line(c)) for c in comparisons]
    return [f"{name}: {line}" if len(comparisons) > 1 else line for name, line in lines if line]


def _line(comparison: Comparison) -> str:
    runs = [run for run in comparison.runs if run.status == "finished" and not run.is_untrained]
    trials = [trial for search in comparison.searches for trials in search.rounds for trial in trials]
    if not runs:
        return ""
    shared = [run for run in runs if run.together > 1]
    alone = [run for run in runs if run.together == 1]
    sentences = [
        f"Finished runs that shared a base with others in one process: {len(shared)} of {len(runs)}; "
        f"alone: {len(alone)}.",
        _reasons("being alone", [run.alone for run in alone if run.alone]),
        _reasons("passes of their own on a shared base", [run.alone for run in shared if run.alone]),
    ]
    sharing = sum(trial.together > 1 for trial in trials)
    sentences += [f"Trials of learning rates that shared one: {sharing} of {len(trials)}."] if trials else []
    return " ".join(filter(None, sentences))


def _reasons(what: str, given: Sequence[str]) -> str:
    """The commonest reasons, each with the number of runs that give it."""
    counted = Counter(" ".join(reason.split()).rstrip(".") for reason in given).most_common()
    told = [f"{reason} ({count})" for reason, count in counted[:_REASONS]]
    more = [f"{len(counted) - _REASONS} more in comparison.json"] if len(counted) > _REASONS else []
    return f"Reasons for {what}: {'; '.join([*told, *more])}." if told else ""
