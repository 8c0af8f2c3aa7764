"""Pictures beside the page, for places that show no HTML."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from adapterlab.compare.report import charts
from adapterlab.compare.report.table import COLUMNS, Row
from adapterlab.errors import require

_MARKS = "os^D"
_LEGEND = 40  # names that there is room for


def can_draw() -> bool:
    """Say whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(groups: Sequence[Sequence[Row]], file: Path | BinaryIO) -> None:
    """Draw training loss, validation loss, and the judge against memory: one line of panels for each group.

    Args:
        groups: rows that share their evaluation data.
        file: PNG to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "reports", "to draw a picture")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 3, squeeze=False)
    for rows, (left, middle, right) in zip(groups, panels, strict=True):
        _losses(left, rows, "training")
        _losses(middle, rows, "validation")
        _tradeoff(right, rows)
        handles, labels = middle.get_legend_handles_labels()
        if 0 < len(handles) <= _LEGEND:
            right.legend(handles, labels, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(file, dpi=110, format="png")


def _losses(panel: Any, rows: Sequence[Row], which: str) -> None:
    values: list[float] = []
    for row in rows:
        if curves := charts.curves_of(row, which):
            steps, means = zip(*charts.across(curves), strict=True)
            low, high = ([y for _, y in charts.across(curves, end)] for end in (min, max))
            style = f"-{_MARKS[row.shape % 4]}" if which == "validation" else "-"
            panel.plot(steps, means, style, color=row.colour, label=row.name, markersize=4, linewidth=1.6)
            panel.fill_between(steps, low, high, color=row.colour, alpha=0.12, linewidth=0)
            values += means
    log = bool(values) and min(values) > 0 and max(values) > 8 * min(values)
    panel.set(title=f"{which.capitalize()} loss", xlabel="step", ylabel="nats/token", yscale="log" if log else "linear")
    _clean(panel)


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
        panel.plot(*point, _MARKS[row.shape % 4], color=row.colour, markersize=7)
    front = charts.pareto(points, higher)
    panel.step(*zip(*front, strict=True), where="post", color="0.5", linewidth=1.2, zorder=0) if front else None
    panel.set(title=f"{'Score' if higher else 'Evaluation loss'} against memory", xlabel=f"peak memory ({name})")
    panel.set_ylabel("right answers (%)" if higher else "nats/token")
    _clean(panel)


def _clean(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
