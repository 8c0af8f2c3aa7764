"""From finished runs to a comparison: forgetting, ranks, differences, recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from adapterlab.compare.recommending import recommend
from adapterlab.compare.results import Comparison, Run, Standing
from adapterlab.compare.statistics import Sheets, differences, interval, ranks


def summarise(runs: Sequence[Run], *, judge: Literal["score", "loss"], level: float, **facts: Any) -> Comparison:
    """Put runs together to a comparison.

    Args:
        runs: all of them, in the order of the configuration, whatever their status.
        judge: what ranks.
        level: of significance.
        facts: the other fields of `Comparison`.
    """
    runs = _with_forgetting(runs)
    sheets = _sheets(runs, judge)
    found = differences(sheets, level) if sheets else []
    standings = _standings(runs, sheets, ranks(_order(sheets, judge), found) if sheets else {})
    comparison = Comparison(
        runs=runs, judge=judge, level=level, standings=standings, differences=found, **facts
    )  # fmt: skip
    return comparison.model_copy(update={"recommendation": recommend(comparison)})


def _with_forgetting(runs: Sequence[Run]) -> list[Run]:
    before = next((run.general_loss for run in runs if run.is_untrained), None)
    if before is None:
        return list(runs)
    return [
        run if run.general_loss is None else run.model_copy(update={"forgetting": run.general_loss - before})
        for run in runs
    ]


def _sheets(runs: Sequence[Run], judge: str) -> Sheets | None:
    """The judge's values of all finished runs, row by row; None while there are none."""
    values: dict[str, list[Sequence[float]]] = {}
    seeds: dict[str, list[int]] = {}
    weights: Sequence[float] = ()
    for run in runs:
        if run.status == "finished" and run.best is not None:
            given, weights = run.best.marks(judge)
            values.setdefault(run.label, []).append(given)
            seeds.setdefault(run.label, []).extend([] if run.is_untrained else [run.seed])
    if not values:
        return None
    arrays = {label: np.array(rows, dtype=float) for label, rows in values.items()}
    return Sheets(arrays, seeds, np.array(weights, dtype=float))


def _order(sheets: Sheets, judge: str) -> list[str]:
    sign = -1 if judge == "score" else 1
    return sorted(sheets.values, key=lambda label: sign * sheets.mean(label))


def _standings(runs: Sequence[Run], sheets: Sheets | None, rank: Mapping[str, int]) -> list[Standing]:
    """Best first; labels without a finished run at the end."""
    labels = list(dict.fromkeys([*rank, *(run.label for run in runs)]))
    standings = []
    for label in labels:
        own = [run for run in runs if run.label == label]
        failed = [run for run in own if run.status == "failed"]
        ranked = label in rank and sheets is not None
        standings.append(
            Standing(
                label=label,
                rank=rank.get(label),
                value=sheets.mean(label) if ranked and sheets else None,
                interval=interval(sheets, label) if ranked and sheets else None,
                tied=[other for other in rank if other != label and rank[other] == rank.get(label)],
                finished=sum(run.status == "finished" for run in own),
                failed=len(failed),
                reason=failed[0].reason if failed else "",
            )
        )
    return standings
