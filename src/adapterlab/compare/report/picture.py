"""Pictures beside the page, for places that show no HTML."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from adapterlab.compare.report import charts
from adapterlab.compare.report.table import COLUMNS, Row
from adapterlab.errors import require

_MARKS = "os^D"
_ACROSS, _MOST = 3, 12  # small panels in a line, and in all


def can_draw() -> bool:
    """Say whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(groups: Sequence[Sequence[Row]], file: Path | BinaryIO) -> None:
    """Draw the losses and the judge against memory, one line of panels for each group.

    The curves of a few methods share two panels; those of many have a small one each.

    Args:
        groups: rows that share their evaluation data.
        file: PNG to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "reports", "to draw a picture")
    from matplotlib.figure import Figure

    counts = [max(1, math.ceil(len(_with_curves(rows)) / _ACROSS)) for rows in groups]
    heights = [4.8 if len(_with_curves(rows)) <= charts.OVERLAID else max(4.8, 2.1 * n)
               for rows, n in zip(groups, counts, strict=True)]  # fmt: skip
    figure = Figure(figsize=(15, sum(heights)), layout="constrained")
    bands = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for rows, band, count in zip(groups, bands, counts, strict=True):
        left, right = band.subfigures(1, 2, width_ratios=(2, 1))
        drawn = _with_curves(rows)
        if len(drawn) <= charts.OVERLAID:
            training, validation = left.subplots(1, 2)
            _losses(training, drawn, "training")
            _losses(validation, drawn, "validation")
        else:
            _each(left, drawn, count)
        _tradeoff(right.subplots(), rows)
    figure.savefig(file, dpi=110, format="png")


def _with_curves(rows: Sequence[Row]) -> list[Row]:
    """The methods whose curves are drawn, the first ones by rank."""
    return [row for row in rows if charts.curves_of(row, "validation") or charts.curves_of(row, "training")][:_MOST]


def _each(band: Any, rows: Sequence[Row], lines: int) -> None:
    """A small panel for each method, all on the same scale, with the validation losses of the others in grey."""
    panels = band.subplots(lines, _ACROSS, sharex=True, sharey=True, squeeze=False).flatten()
    held = {row.name: charts.across(curves) for row in rows if (curves := charts.curves_of(row, "validation"))}
    for panel in panels[len(rows) :]:
        panel.set_visible(False)
    for row, panel in zip(rows, panels, strict=False):
        for name, line in held.items():
            if name != row.name:
                panel.plot(*zip(*line, strict=True), color="0.82", linewidth=0.9, zorder=0)
        values = _curve(panel, row, "validation") if row.name in held else []
        last = f", {values[-1]:.3f}" if values else ""
        panel.set_title(f"{row.name}{last}", fontsize=9, color=row.colour)
        _clean(panel)
    every = [y for line in held.values() for _, y in line]
    if every and min(every) > 0 and max(every) > charts.LOG * min(every):
        panels[0].set_yscale("log")
    band.supxlabel("step", fontsize=9)
    band.supylabel("validation loss, nats/token", fontsize=9)


def _losses(panel: Any, rows: Sequence[Row], which: str) -> None:
    values = [y for row in rows if charts.curves_of(row, which) for y in _curve(panel, row, which)]
    log = bool(values) and min(values) > 0 and max(values) > charts.LOG * min(values)
    panel.set(title=f"{which.capitalize()} loss", xlabel="step", ylabel="nats/token", yscale="log" if log else "linear")
    if values:
        panel.legend(fontsize=8, frameon=False)
    _clean(panel)


def _curve(panel: Any, row: Row, which: str) -> list[float]:
    """Draw one method's mean over seeds with their range, and return the mean."""
    curves = charts.curves_of(row, which)
    steps, means = zip(*charts.across(curves), strict=True)
    low, high = ([y for _, y in charts.across(curves, end)] for end in (min, max))
    style = f"-{_MARKS[row.shape % 4]}" if which == "validation" else "-"
    panel.plot(steps, means, style, color=row.colour, label=row.name, markersize=4, linewidth=1.6)
    panel.fill_between(steps, low, high, color=row.colour, alpha=0.12, linewidth=0)
    return list(means)


def _tradeoff(panel: Any, rows: Sequence[Row]) -> None:
    judge, _, _, higher = charts.judged(rows)
    memory = next(c for c in COLUMNS if c.key == "peak_memory_bytes")
    scale = 100.0 if higher else 1.0
    unit, name = charts.cost_unit(memory.key, max((row.cells[memory.key].value or 0 for row in rows), default=0))
    points = []
    for row in rows:
        cell, cost = row.cells[judge], row.cells[memory.key].value
        if cell.value is None or cost is None or row.series is None:
            continue
        point = (cost / unit, scale * cell.value)
        points.append(point)
        low, high = (scale * end for end in cell.interval or (cell.value, cell.value))
        panel.plot([point[0]] * 2, [low, high], color=row.colour, alpha=0.5, linewidth=1.2)
        panel.plot(*point, _MARKS[row.shape % 4], color=row.colour, markersize=7, label=row.name)
    front = charts.pareto(points, higher)
    panel.step(*zip(*front, strict=True), where="post", color="0.5", linewidth=1.2, zorder=0) if front else None
    panel.set(title=f"{'Score' if higher else 'Evaluation loss'} against memory", xlabel=f"peak memory ({name})")
    panel.set_ylabel("right answers (%)" if higher else "nats/token")
    if points:
        panel.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    _clean(panel)


def _clean(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
