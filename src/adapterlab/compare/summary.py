"""From finished runs to a comparison: forgetting, ranks, differences, recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from adapterlab.compare.recommending import recommend
from adapterlab.compare.results import UNTRAINED, Comparison, Run, Standing
from adapterlab.compare.statistics import ALL_PAIRS, DRAFT, Sheets, differences, interval, ranks, sheets_of


def summarise(runs: Sequence[Run], *, judge: Literal["score", "loss"], level: float, **facts: Any) -> Comparison:
    """Put runs together to a comparison.

    Args:
        runs: all of them, in the order of the configuration, whatever their status.
        judge: what ranks.
        level: of significance.
        facts: the other fields of `Comparison`.
    """
    runs = _with_forgetting(runs)
    sheets = sheets_of(runs, judge)
    order = _order(sheets, judge) if sheets else []
    references = references_of(order)
    draft = None if facts.get("finished") else DRAFT  # it is written anew whenever a run has ended
    found = differences(sheets, level, references=references, count=draft) if sheets else []
    standings = _standings(runs, sheets, ranks(order, found, references))
    comparison = Comparison(
        runs=runs, judge=judge, level=level, standings=standings, differences=found, **facts
    )  # fmt: skip
    return comparison.model_copy(update={"recommendation": recommend(comparison)})


def references_of(order: Sequence[str]) -> tuple[str, ...]:
    """Return whom all others are compared with where all pairs would be too many; none: all pairs are compared.

    Args:
        order: labels, best first.
    """
    return tuple(label for label in order if label in (order[0], UNTRAINED)) if len(order) > ALL_PAIRS else ()


def _with_forgetting(runs: Sequence[Run]) -> list[Run]:
    before = next((run.general_loss for run in runs if run.is_untrained), None)
    if before is None:
        return list(runs)
    return [
        run if run.general_loss is None else run.model_copy(update={"forgetting": run.general_loss - before})
        for run in runs
    ]


def _order(sheets: Sheets, judge: str) -> list[str]:
    sign = -1 if judge == "score" else 1
    return sorted(sheets.values, key=lambda label: sign * sheets.mean(label))


def _standings(runs: Sequence[Run], sheets: Sheets | None, rank: Mapping[str, int]) -> list[Standing]:
    """Best first; labels without a finished run at the end."""
    runs_of: dict[str, list[Run]] = {label: [] for label in rank}
    for run in runs:
        runs_of.setdefault(run.label, []).append(run)
    alike: dict[int, list[str]] = {}
    for label, place in rank.items():
        alike.setdefault(place, []).append(label)
    standings = []
    for label, own in runs_of.items():
        failed = [run for run in own if run.status == "failed"]
        ranked = label in rank and sheets is not None
        standings.append(
            Standing(
                label=label,
                rank=rank.get(label),
                value=sheets.mean(label) if ranked and sheets else None,
                interval=interval(sheets, label) if ranked and sheets else None,
                tied=[other for other in alike.get(rank.get(label, 0), []) if other != label],
                finished=sum(run.status == "finished" for run in own),
                failed=len(failed),
                reason=failed[0].reason if failed else "",
            )
        )
    return standings
