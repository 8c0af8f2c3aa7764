"""Pictures beside the page, for places that show no HTML."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapterlab.compare.report import charts
from adapterlab.compare.report.svg import Axis, arrow_to
from adapterlab.compare.report.table import Row
from adapterlab.errors import require

_MARKS = "os^D"
_ARROWS = {"▲": "^", "▼": "v", "◀": "<", "▶": ">"}
_ACROSS, _MOST = 3, 12  # small panels in a line, and methods that are shown in all
_OTHERS = "0.72"  # of the methods that are not named
_WIDTH, _HEIGHT, _LINE = 15.0, 4.8, 2.1  # inches: of the picture, of a line of large panels, of one of small panels


@dataclass(frozen=True)
class _Group:
    """What is drawn of rows that share their evaluation data; a panel with nothing to show is not there.

    Attributes:
        rows: all of them.
        named: names of those that are shown, the first ones by rank.
        curved: those of them with curves.
        scatter: of the judge against memory; None where no memory is known.
        note: which ones are shown, where not all are; else "".
    """

    rows: Sequence[Row]
    named: Collection[str]
    curved: Sequence[Row]
    scatter: charts.Scatter | None
    note: str

    @property
    def overlaid(self) -> list[str]:
        """Curves that share a panel with all methods; none where each method has a panel of its own."""
        few = len(self.curved) <= charts.OVERLAID
        return [which for which in ("training", "validation") if few and any(_curves(self.curved, which))]

    @property
    def small(self) -> int:
        """Lines of small panels."""
        return 0 if len(self.curved) <= charts.OVERLAID else math.ceil(len(self.curved) / _ACROSS)

    @property
    def height(self) -> float:
        """In inches."""
        return max(_HEIGHT, _LINE * self.small)


def can_draw() -> bool:
    """Say whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(groups: Sequence[Sequence[Row]], file: Path | BinaryIO) -> None:
    """Write the losses and the judge against memory as a PNG.

    Args:
        groups: rows that share their evaluation data.
        file: to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure(groups).savefig(file, dpi=110, format="png")


def figure(groups: Sequence[Sequence[Row]]) -> Any:
    """Draw the losses and the judge against memory, one line of panels for each group.

    The curves of a few methods share two panels; those of many have a small one each, for the first ones by rank.

    Args:
        groups: rows that share their evaluation data.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "reports", "to draw a picture")
    from matplotlib.figure import Figure

    found = [_group(rows) for rows in groups]
    whole = Figure(figsize=(_WIDTH, sum(group.height for group in found)), layout="constrained")
    bands = whole.subfigures(len(found), 1, height_ratios=[group.height for group in found], squeeze=False)[:, 0]
    for group, band in zip(found, bands, strict=True):
        _draw(group, band)
    return whole


def _group(rows: Sequence[Row]) -> _Group:
    scatter = charts.scatter(rows, "peak_memory_bytes")
    curved = [row for row in rows if any(charts.curves_of(row, which) for which in ("validation", "training"))]
    known = {row.name for row in curved} | (set(scatter.at) if scatter else set())
    names = [row.name for row in rows if row.name in known]
    named, left = names[:_MOST], len(names[_MOST:])
    note = ""
    if left:
        where = " (grey in the last panel)" if scatter is not None else ""
        note = f"{_MOST} of {len(names)} methods are shown, the first ones by rank. Not shown: {left}{where}."
    return _Group(rows, named, [row for row in curved if row.name in named], scatter, note)


def _draw(group: _Group, band: Any) -> None:
    if group.note:
        band.suptitle(group.note, fontsize=10, x=0.01, ha="left")
    widths = [2 if group.small else len(group.overlaid), 1 if group.scatter else 0]
    if not any(widths):
        band.text(0.5, 0.5, "No run has anything to show yet.", ha="center", va="center")
        return
    shares = [width for width in widths if width]
    parts = list(band.subfigures(1, len(shares), width_ratios=shares, squeeze=False)[0])
    if group.small:
        _each(parts[0], group.curved, group.small)
    elif group.overlaid:
        panels = parts[0].subplots(1, len(group.overlaid), squeeze=False)[0]
        for which, panel in zip(group.overlaid, panels, strict=True):
            _losses(panel, group.curved, which)
    if group.scatter is not None:
        _tradeoff(parts[-1].subplots(), group, group.scatter)


def _curves(rows: Sequence[Row], which: str) -> list[tuple[Row, list[charts.Curve]]]:
    return [(row, curves) for row in rows if (curves := charts.curves_of(row, which))]


def _each(band: Any, rows: Sequence[Row], lines: int) -> None:
    """A small panel for each method, all on the same scale, with the validation losses of the others in grey."""
    panels = band.subplots(lines, _ACROSS, sharex=True, sharey=True, squeeze=False).flatten()
    found = charts.panels(rows)
    for panel in panels[len(rows) :]:
        panel.set_visible(False)
    for row, panel in zip(rows, panels, strict=False):
        for name, line in found.held.items():
            if name != row.name:
                panel.plot(*zip(*line, strict=True), color="0.82", linewidth=0.9, zorder=0)
        if trained := found.trained[row.name]:
            panel.plot(*zip(*trained, strict=True), color=row.colour, linewidth=0.9, linestyle=(0, (3, 2)), alpha=0.8)
        held = found.held.get(row.name, [])
        if held:
            _curve(panel, row, charts.curves_of(row, "validation"), _MARKS[row.shape % 4])
        last = f", {held[-1][1]:.3f}" if held else ""
        panel.set_title(f"{row.name}{last}", fontsize=9, color=row.colour)
        _along(panel, "x", found.x, "")
        _along(panel, "y", found.y, "")
        _clean(panel)
    band.supxlabel("step (with marks: validation; broken: training, smoothed; grey: the others)", fontsize=9)
    band.supylabel(found.y.label, fontsize=9)


def _losses(panel: Any, rows: Sequence[Row], which: str) -> None:
    drawn = _curves(rows, which)
    ends = [charts.across(curves, end) for _, curves in drawn for end in (min, max)]
    _along(panel, "x", charts.step_axis(ends), "step")
    _along(panel, "y", charts.loss_axis([y for line in ends for _, y in line], which), "nats/token")
    for row, curves in drawn:
        _curve(panel, row, curves, _MARKS[row.shape % 4] if which == "validation" else "")
    panel.set_title(f"{which.capitalize()} loss")
    panel.legend(fontsize=8, frameon=False)
    _clean(panel)


def _curve(panel: Any, row: Row, curves: Sequence[charts.Curve], mark: str) -> None:
    """Draw one method's mean over seeds with their range."""
    steps, means = zip(*charts.across(curves), strict=True)
    low, high = ([y for _, y in charts.across(curves, end)] for end in (min, max))
    panel.plot(steps, means, f"-{mark}", color=row.colour, label=row.name, markersize=4, linewidth=1.6)
    panel.fill_between(steps, low, high, color=row.colour, alpha=0.12, linewidth=0)


def _tradeoff(panel: Any, group: _Group, found: charts.Scatter) -> None:
    judge, title, form, higher = charts.judged(group.rows)
    _along(panel, "x", found.x, found.x.label)
    _along(panel, "y", found.y, title)
    panel.set_title(f"{'Score' if higher else 'Evaluation loss'} against memory")
    outside: list[tuple[tuple[float, float], str, str]] = []
    for row in (row for row in group.rows if row.name in found.at):
        named, point, mark = row.name in group.named, found.at[row.name], _MARKS[row.shape % 4]
        colour = row.colour if named else _OTHERS
        if named:
            panel.plot([], [], mark, color=colour, markersize=7, linestyle="", label=row.name)
        if not found.holds(row.name):
            outside.append((point, found.written(row) if named else "", colour))
            continue
        if named and (interval := row.cells[judge].interval):
            panel.plot([point[0]] * 2, interval, color=colour, alpha=0.5, linewidth=1.2)
        panel.plot(*point, mark, color=colour, markersize=7 if named else 5, zorder=3 if named else 1)
    for row in group.rows:
        value = row.cells[judge].value
        if row.series is None and value is not None and found.y.within(value):
            panel.axhline(value, color=row.colour, linewidth=1.2, linestyle="--", label=row.name)
        elif row.series is None and value is not None:
            outside.append(((found.x.low, value), f"{row.name} {form(value)}", row.colour))
    panel.plot(*zip(*found.outline(), strict=True), color="0.5", linewidth=1.2, zorder=0) if found.front else None
    _beyond(panel, outside, found)
    panel.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    _clean(panel)


def _beyond(panel: Any, outside: Sequence[tuple[tuple[float, float], str, str]], found: charts.Scatter) -> None:
    """Draw arrows at the edge for what lies outside, and write their names, one line further in for each at an edge."""
    stacked = dict.fromkeys(_ARROWS, 0)
    for point, text, colour in sorted(outside):
        arrow = arrow_to(point, found.x, found.y)
        x, y = found.x.clamped(point[0]), found.y.clamped(point[1])
        panel.plot(x, y, _ARROWS[arrow], color=colour, markersize=8, clip_on=False, zorder=4)
        if not text:
            continue
        left = found.x.at(x) < 0.5
        down = {"▲": -1, "▼": 1}.get(arrow, -1 if found.y.at(y) > 0.5 else 1) * (4 + 11 * stacked[arrow])
        stacked[arrow] += 1
        panel.annotate(
            text, (x, y), (7 if left else -7, down), textcoords="offset points", color=colour, fontsize=8, zorder=5,
            ha="left" if left else "right", va="bottom" if down > 0 else "top",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip


def _along(panel: Any, which: str, axis: Axis, label: str) -> None:
    """Give a panel a scale as the page's charts have it, with the same round ticks."""
    scale = panel.xaxis if which == "x" else panel.yaxis
    panel.set(**{f"{which}scale": "log" if axis.log else "linear", f"{which}lim": (axis.low, axis.high)})
    scale.set_ticks(axis.ticks(), labels=[axis.form(tick) for tick in axis.ticks()])
    scale.set_ticks([], minor=True)
    scale.set_label_text(label)


def _clean(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
