"""The pictures of the report. Each function returns `None` where there is nothing to draw."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from adapterlab.compare.report import amounts, scales
from adapterlab.compare.report.svg import NARROW, SMALL, WIDE, Axis, Plot
from adapterlab.compare.report.table import COLUMNS, JUDGED, Column, Row
from adapterlab.compare.results import Comparison, Difference, Search

Curve = list[tuple[float, float]]

_SMOOTHING = 0.9  # weight of the past in a training curve
_POINTS = 240  # of a curve at most; more cannot be seen
_REFERENCES = 12  # methods that the others can be compared with
OVERLAID = 4  # methods whose curves can be told apart in one chart
_PANELS = 24  # methods with a chart of their own at most
_NAMES = 24  # methods that are named in a chart at most; the others are found by pointing at them
_ASIDE = 32  # units of a chart's width for each letter of the names beside it, at most
_LOG = 4  # times that the largest loss is the smallest from which a logarithmic scale shows more


@dataclass(frozen=True)
class Figure:
    """A drawing with what is said about it.

    Attributes:
        title: stands above it.
        svg: the drawing, ready for a page.
        narrow: the same drawn for a narrow screen; "" where it fits there as it is.
        note: stands below it.
        key: short name, unique in a group of alternatives.
        css: classes of what it shows.
    """

    title: str
    svg: str
    narrow: str = ""
    note: str = ""
    key: str = ""
    css: str = ""


def judged(rows: Sequence[Row]) -> tuple[str, str, Callable[[float], str], bool]:
    """Return column key, title, format and direction of what the rows are ranked by."""
    score = rows[0].comparison.higher_is_better
    key = JUDGED[rows[0].comparison.judge]
    column = next(c for c in COLUMNS if c.key == key)
    return key, "share of right answers" if score else "evaluation loss (nats/token)", column.form, score


@dataclass(frozen=True)
class Scatter:
    """The trained methods' score (or loss) against a cost.

    Attributes:
        cost: its column.
        x, y: the scales, which hold most methods.
        at: where each one lies, which may be outside; what is no number lies infinitely far on the worse side.
        front: of Pareto.
    """

    cost: Column
    x: Axis
    y: Axis
    at: Mapping[str, tuple[float, float]]
    front: Curve

    def holds(self, name: str) -> bool:
        """Say whether a method lies inside."""
        return self.x.within(self.at[name][0]) and self.y.within(self.at[name][1])

    def outline(self) -> Curve:
        """Return the front as a line with steps, which stays inside."""
        return [(self.x.clamped(cost), self.y.clamped(value)) for cost, value in _stairs(self.front)]

    def written(self, row: Row) -> str:
        """Name a method outside, with what of it lies there."""
        judge, _, form, _ = judged([row])
        cost, value = self.at[row.name]
        parts = [] if self.x.within(cost) else [row.cells[self.cost.key].text]
        parts += [] if self.y.within(value) else [form(_value(row, judge))]
        return f"{row.name} {', '.join(parts)}"


def scatter(rows: Sequence[Row], key: str) -> Scatter | None:
    """Find the places and scales of score (or loss) against a cost; None where no trained method has both.

    Args:
        rows: of comparisons that share their evaluation data.
        key: column of the cost.
    """
    judge, title, _, higher = judged(rows)
    cost = next(c for c in COLUMNS if c.key == key)
    drawn = [r for r in rows if r.series is not None and _both(r, key, judge)]
    if not drawn:
        return None
    unit, name = cost_unit(key, max(_value(r, key) for r in drawn))
    worst = -math.inf if higher else math.inf
    at = {r.name: (_value(r, key) / unit, v if math.isfinite(v := _value(r, judge)) else worst) for r in drawn}
    values = scales.shown([(at[r.name][1], r.cells[judge].interval) for r in drawn], higher=higher)
    costs = scales.shown([(cost_, None) for cost_, _ in at.values()], higher=False)
    return Scatter(
        cost=cost,
        x=Axis.over(costs, f"{cost.title} ({name})", form="{:,g}".format),
        y=Axis.over(values, title, form=_whole_percent if higher else amounts.plain),
        at=at,
        front=pareto((point for point in at.values() if math.isfinite(point[1])), higher),
    )


def tradeoff(rows: Sequence[Row], key: str) -> Figure | None:
    """Draw score (or loss) against a cost, with the Pareto front.

    The scale is that of most trained methods; what lies far outside, trained or not, is named at the edge.

    Args:
        rows: of comparisons that share their evaluation data.
        key: column of the cost.
    """
    found = scatter(rows, key)
    if found is None:
        return None
    _, title, _, higher = judged(rows)
    drawn = [row for row in rows if row.name in found.at]
    named = _to_name(drawn, found)
    wide, narrow = (_cloud(Plot(f"{title} against {found.cost.title}", found.x, found.y, size=size), rows, found, named)
                    for size in (WIDE, NARROW))  # fmt: skip
    note = f"{'Up' if higher else 'Down'} and to the left is better. The line joins the Pareto front."
    if not all(found.holds(row.name) for row in drawn):
        note += " Arrows at the edge: so far from the others that the scale leaves them out."
    if len(named) < len(drawn):
        note += f" {len(named)} of {len(drawn)} are named: the front and the first ranks; point at the others."
    return Figure(f"{'Score' if higher else 'Evaluation loss'} against {found.cost.title}", wide, narrow, note)


def _to_name(drawn: Sequence[Row], found: Scatter) -> set[str]:
    """The methods whose names stand in the drawing: all where there is room, else the front and the first ranks."""
    if len(drawn) <= _NAMES:
        return set(found.at)
    on_front = [row.name for row in drawn if found.at[row.name] in found.front]
    return set(list(dict.fromkeys([*on_front, *(row.name for row in drawn)]))[:_NAMES])


def _cloud(plot: Plot, rows: Sequence[Row], found: Scatter, named: Collection[str]) -> str:
    """Draw the methods, their intervals and the front."""
    judge, _, form, _ = judged(rows)
    drawn = [row for row in rows if row.name in found.at]
    inside = [row for row in drawn if found.holds(row.name)]
    untrained = [(r, v) for r in rows if r.series is None and (v := r.cells[judge].value) is not None]
    for row, value in untrained:
        if plot.y.within(value):
            plot.level(value, "base dashed", f"{row.name}: {form(value)}")
    plot.line(found.outline(), "front", "Pareto front: no method is better at no higher cost", clear=True)
    for row in inside:
        if interval := row.cells[judge].interval:
            plot.line([(found.at[row.name][0], end) for end in interval], f"whisker series {row.css}", clear=True)
    tips = {
        row.name: f"{row.name}: {row.cells[judge]}, {found.cost.title} {row.cells[found.cost.key]}" for row in drawn
    }
    for row in inside:
        plot.dot(found.at[row.name], f"dot series {row.css}", tips[row.name], row.shape, 5.5)
    for row, value in untrained:
        if not plot.y.within(value):
            plot.beyond((plot.x.low, value), f"{row.name} {form(value)}", "base")
    for row in drawn:
        if not found.holds(row.name):
            text = found.written(row) if row.name in named else ""
            plot.beyond(found.at[row.name], text, f"series {row.css}", tip=tips[row.name])
    for row in inside:
        if row.name in named:
            plot.label(found.at[row.name], row.name, f"series {row.css}")
    return plot.to_html()


def cost_unit(key: str, largest: float) -> tuple[float, str]:
    """Return in which unit a cost is drawn: its size in the unit of the column, and its name."""
    if key.endswith("_bytes"):
        return (2**30, "GiB") if largest >= 10 * 2**30 else (2**20, "MiB")
    return (3600, "h") if largest >= 3 * 3600 else (60, "min") if largest >= 180 else (1, "s")


def pareto(points: Iterable[tuple[float, float]], higher: bool) -> Curve:
    """Return the points that no other beats in one coordinate without losing in the other, by rising cost.

    Args:
        points: cost and value.
        higher: whether more value is better; less cost always is.
    """
    sign = -1.0 if higher else 1.0
    front: Curve = []
    for cost, value in sorted(set(points), key=lambda p: (p[0], sign * p[1])):
        if not front or sign * value < sign * front[-1][1]:
            front.append((cost, value))
    return front


def losses(rows: Sequence[Row]) -> tuple[list[Figure], list[Figure]]:
    """Draw the loss curves: few methods in one chart each for validation and training, many in a chart of their own.

    Lines of more than a few methods lie over each other, whatever their colour.

    Args:
        rows: of comparisons that share their evaluation data.

    Returns:
        Charts with all methods, and small ones with a method each; one of the two is empty.
    """
    drawn = [row for row in rows if curves_of(row, "validation") or curves_of(row, "training")]
    if len(drawn) <= OVERLAID:
        found = [_overlaid(drawn, which) for which in ("validation", "training")]
        return [figure for figure in found if figure is not None], []
    return [], _each(drawn[:_PANELS])


def _overlaid(rows: Sequence[Row], which: str) -> Figure | None:
    """Lines of a few methods in one chart, each named at its end: the mean over seeds, and their range."""
    curves = [(row, across(many), many) for row in rows if (many := curves_of(row, which))]
    if not curves:
        return None
    y = loss_axis([y for *_, many in curves for end in (min, max) for _, y in across(many, end)], which)
    x = step_axis(line for _, line, _ in curves)
    drawings, longest = [], max(len(row.name) for row, *_ in curves)
    for size in (WIDE, NARROW):
        plot = Plot(f"{which} loss", x, y, size=size, aside=min(longest, int(size[0] / _ASIDE)))
        for number, (row, line, many) in enumerate(curves):
            if len(many) > 1:
                plot.band(across(many, min), across(many, max), f"band series {row.css}")
            plot.line(line, f"line stroke{number} series {row.css}", row.name)
        for row, line, _ in curves if which == "validation" else ():
            for step, value in line if len(line) <= 24 else []:
                tip = f"{row.name}, step {step:g}: {amounts.loss(value)}"
                plot.dot((step, value), f"dot series {row.css}", tip, row.shape, 3)
        plot.ends([(line[-1], row.name, f"series {row.css}") for row, line, _ in curves])
        drawings.append(plot.to_html())
    seeds = " Bands show the range over seeds." if any(len(many) > 1 for *_, many in curves) else ""
    how = " Smoothed." if which == "training" else ""
    return Figure(f"{which.capitalize()} loss", drawings[0], drawings[1], f"Mean over seeds.{how}{seeds}{_scale(y)}")


@dataclass(frozen=True)
class Panels:
    """What small charts of a method each have in common: curves by name, and the scales of all.

    Attributes:
        held: mean validation losses over the seeds.
        trained: mean training losses from the first of those on; before it, nothing can be compared.
        x, y: the scales.
    """

    held: Mapping[str, Curve]
    trained: Mapping[str, Curve]
    x: Axis
    y: Axis


def panels(rows: Sequence[Row]) -> Panels:
    """Collect the loss curves of many methods, and scales that hold them all.

    Args:
        rows: with curves.
    """
    held = {row.name: across(curves) for row in rows if (curves := curves_of(row, "validation"))}
    first = min((line[0][0] for line in held.values()), default=0.0)
    trained = {row.name: _after(across(curves_of(row, "training")), first) for row in rows}
    spans = [y for row in rows for end in (min, max) for _, y in across(curves_of(row, "validation"), end)]
    y = loss_axis([*spans, *(y for line in trained.values() for _, y in line)], "loss")
    return Panels(held, trained, step_axis([*held.values(), *trained.values()]), y)


def step_axis(lines: Iterable[Curve]) -> Axis:
    """Return a scale that holds the steps of all lines."""
    return Axis.over([x for line in lines for x, _ in line], "step", form=amounts.plain)


def _each(rows: Sequence[Row]) -> list[Figure]:
    """A small chart for each method, all on the same scale, with the other methods behind it."""
    found = panels(rows)
    return [_one(row, rows, found) for row in rows]


def _one(row: Row, rows: Sequence[Row], found: Panels) -> Figure:
    plot = Plot(f"loss of {row.name}", found.x, found.y, size=SMALL)
    for other in rows:
        if other is not row and other.name in found.held:
            plot.line(found.held[other.name], f"context {other.css}", other.name)
    own, many = found.held.get(row.name, []), curves_of(row, "validation")
    if len(many) > 1:
        plot.band(across(many, min), across(many, max), f"band series {row.css}")
    plot.line(found.trained[row.name], f"line thin series {row.css}", f"{row.name}, training")
    plot.line(own, f"line series {row.css}", f"{row.name}, validation")
    for step, value in own if len(own) <= 24 else []:
        plot.dot((step, value), f"dot series {row.css}", f"step {step:g}: {amounts.loss(value)}", row.shape, 3)
    note = f"{amounts.loss(own[-1][1])} at step {own[-1][0]:g}." if own else "Not looked at yet."
    return Figure(row.name, plot.to_html(), note=note, css=row.css)


def loss_axis(values: Iterable[float], name: str) -> Axis:
    """Return a scale of losses, logarithmic where that shows more.

    Args:
        values: that it holds, as far as they are finite.
        name: "training", "validation", or "loss" for both.
    """
    known = [value for value in values if math.isfinite(value)]
    label = "loss (nats/token)" if name == "loss" else f"{name} loss (nats/token)"
    return Axis.over(known, label, log=bool(known) and min(known) > 0 and max(known) > _LOG * min(known))


def _scale(axis: Axis) -> str:
    return " Logarithmic scale." if axis.log else ""


def _after(curve: Curve, first: float) -> Curve:
    return [(x, y) for x, y in curve if x >= first]


def curves_of(row: Row, which: str) -> list[Curve]:
    """Return the loss curves of a row, one for each seed; training curves are smoothed.

    Args:
        row: of the table; unfinished runs count too.
        which: "validation" or "training".
    """
    runs = row.comparison.runs_of(row.key, None)
    if which == "validation":
        return [[(float(step), loss) for step, loss in run.eval_curve] for run in runs if run.eval_curve]
    return [_smooth(run.train_curve) for run in runs if run.train_curve]


def across(curves: Sequence[Curve], choose: Callable[[list[float]], float] = statistics.fmean) -> Curve:
    """Put curves together, step by step.

    Args:
        curves: of the seeds.
        choose: makes one value of those at a step; the mean by default.
    """
    at: dict[float, list[float]] = {}
    for curve in curves:
        for x, y in curve:
            at.setdefault(x, []).append(y)
    return [(x, choose(values)) for x, values in sorted(at.items())]


def learning_rate(search: Search, row: Row) -> Figure | None:
    """Draw what the learning-rate search of one method saw."""
    known = [t for trials in search.rounds for t in trials if t.loss is not None and t.lr > 0]
    if not known:
        return None
    values = [t.loss for t in known if t.loss is not None]
    x = Axis.over([t.lr for trials in search.rounds for t in trials], "learning rate", log=True, form=amounts.rate)
    y = loss_axis(values, "validation")
    plot = Plot(f"learning-rate search of {row.name}", x, y, size=SMALL)
    if search.chosen:
        plot.upright(search.chosen, "chosen", f"chosen: {amounts.rate(search.chosen)}")
    for number, trials in enumerate(search.rounds, 1):
        strength = " early" if number < len(search.rounds) else ""
        plot.line([(t.lr, t.loss) for t in trials if t.loss is not None], f"line series {row.css}{strength}")
        for t in trials:
            tip = f"{amounts.rate(t.lr)}, {t.steps} steps: "
            if t.loss is None:
                plot.dot((t.lr, y.high), "failed", tip + (t.reason or "failed"), 3, 4)
            else:
                plot.dot((t.lr, t.loss), f"dot series {row.css}{strength}", tip + amounts.loss(t.loss), row.shape, 4)
    steps = ", then ".join(f"{trials[0].steps}" for trials in search.rounds if trials)
    note = f"Chosen: {amounts.rate(search.chosen)}." if search.chosen else "No rate worked."
    broken = " Red: training failed." if any(t.loss is None for trials in search.rounds for t in trials) else ""
    return Figure(row.name, plot.to_html(), note=f"{note} Rounds of {steps} steps.{broken}")


def differences(rows: Sequence[Row]) -> list[Figure]:
    """Draw the differences of each method to a reference, with their intervals, one drawing for each reference.

    Args:
        rows: that are ranked together, best first. The first few become references.
    """
    comparison = rows[0].comparison
    ranked = [row for row in rows if row.rank is not None]
    pairs = {(d.a, d.b): d for d in comparison.differences}
    figures: list[Figure] = []
    for row in ranked:
        found = [(o, d) for o in ranked if o is not row and (d := between(pairs, o.key, row.key)) is not None]
        figures += [_forest(comparison, row, found)] if found else []
        if len(figures) == _REFERENCES:
            break
    return figures


def between(pairs: Mapping[tuple[str, str], Difference], method: str, reference: str) -> Difference | None:
    """Return the difference `method` minus `reference`, however it is written down.

    Args:
        pairs: differences by their two labels.
        method: label of the first.
        reference: label of the second.
    """
    if (method, reference) in pairs:
        return pairs[method, reference]
    if (d := pairs.get((reference, method))) is None:
        return None
    turned = {"a": method, "b": reference, "value": -d.value, "interval": (-d.interval[1], -d.interval[0])}
    return d.model_copy(update=turned)


def _forest(comparison: Comparison, reference: Row, found: Sequence[tuple[Row, Difference]]) -> Figure:
    form = amounts.points if comparison.higher_is_better else amounts.signed
    unit = "percentage points" if comparison.higher_is_better else "nats/token"
    judging = [(d.value, d.interval) for row, d in found if row.series is not None or len(found) == 1]
    ends = scales.shown(judging, higher=comparison.higher_is_better)
    x = Axis.over([0.0, *ends], f"difference of the {comparison.judge} ({unit})", form=form)
    worst = -math.inf if comparison.higher_is_better else math.inf
    drawings = [_bars(found, reference, x, form, worst, width) for width in (620.0, NARROW[0])]
    better = "right" if comparison.higher_is_better else "left"
    note = f"Each method minus {reference.key}; further to the {better} is better. Bars are 95 % intervals. "
    note += "Hollow marks cannot be told apart from the reference after Holm's correction."
    return Figure(f"Difference to {reference.key}", drawings[0], drawings[1], note, reference.key)


def _bars(
    found: Sequence[tuple[Row, Difference]],
    reference: Row,
    x: Axis,
    form: Callable[[float], str],
    worst: float,
    width: float,
) -> str:
    y, size = Axis("", len(found) - 0.5, -0.5), (width, 66 + 26.0 * len(found))
    plot = Plot(f"differences to {reference.key}", x, y, y_names=[row.key for row, _ in found], size=size)
    plot.upright(0.0, "zero")
    for i, (row, d) in enumerate(found):
        low, high = (form(end) for end in d.interval)
        verdict = "distinct" if d.distinct else "cannot be told apart"
        tip = f"{d.a} minus {d.b}: {form(d.value)} ({low} to {high}), corrected p = {d.p_holm:.2g}: {verdict}"
        if not x.within(d.value):
            value = d.value if math.isfinite(d.value) else worst
            plot.beyond((value, i), f"{form(d.value)} ({low} to {high})", row.css, brief=form(d.value), tip=tip)
            continue
        faint = "" if d.distinct else " hollow"
        plot.line([(x.clamped(end), i) for end in d.interval], f"bar series {row.css}{faint}", tip)
        plot.dot((d.value, i), f"dot series {row.css}{faint}", tip, row.shape, 5)
    return plot.to_html()


def _both(row: Row, *keys: str) -> bool:
    return all(row.cells[key].value is not None for key in keys)


def _value(row: Row, key: str) -> float:
    value = row.cells[key].value
    return math.nan if value is None else value


def _whole_percent(value: float) -> str:
    return f"{100 * value:g} %"


def _stairs(front: Curve) -> Curve:
    steps: Curve = front[:1]
    for (_, before), (cost, value) in pairwise(front):
        steps += [(cost, before), (cost, value)]
    return steps


def _smooth(points: Sequence[tuple[int, float]]) -> Curve:
    past, weight, curve = 0.0, 0.0, []
    for step, value in points:
        if math.isfinite(value):
            past, weight = _SMOOTHING * past + (1 - _SMOOTHING) * value, _SMOOTHING * weight + 1 - _SMOOTHING
            curve.append((float(step), past / weight))
    stride = max(1, math.ceil(len(curve) / _POINTS))
    return curve[::stride] if (len(curve) - 1) % stride == 0 else [*curve[::stride], curve[-1]]
