"""One method far from all others: what the scales hold, and how what they leave out is shown."""

import itertools
import math
import re

import pytest
from fabricate import CLASSIC, fabricate

from adapterlab.compare.report import charts, scales, table
from adapterlab.compare.report.svg import NARROW, WIDE, Axis, Plot

KEY = "peak_memory_bytes"
FEW = ("lora r=8", "lora_plus r=16", "dora", "ia3")


def judged_by_loss(losses, **changes):
    """A comparison whose methods have these losses, and intervals of 0.03 around them."""
    made = fabricate(methods=tuple(losses), failed=False, judge="loss")
    runs = []
    for run in made.runs:
        loss = losses.get(run.label, 3.3)
        exam = run.best.model_copy(update={"loss": loss, "score": None, "interval": None, "right": []})
        runs.append(run.model_copy(update={"best": exam, "final": exam}))
    order = sorted(losses, key=lambda label: losses[label] if math.isfinite(losses[label]) else 99)
    place = {"untrained": len(losses), **{label: i for i, label in enumerate(order)}}
    standings = [
        s.model_copy(update={"rank": place[s.label] + 1, "value": v, "interval": (v - 0.015, v + 0.015)})
        for s in made.standings
        if (v := losses.get(s.label, 3.3)) is not None
    ]
    differences = []
    for d in made.differences:
        value = losses.get(d.a, 3.3) - losses.get(d.b, 3.3)
        differences.append(d.model_copy(update={"value": value, "interval": (value - 0.02, value + 0.02)}))
    new = {"runs": runs, "standings": sorted(standings, key=lambda s: s.rank), "differences": differences}
    return made.model_copy(update={**new, **changes})


def test_a_scale_holds_the_better_half_and_what_is_near_to_it():
    def held(values, higher=False, width=0.0):
        found = scales.shown([(v, (v - width / 2, v + width / 2)) for v in values], higher=higher)
        return [v for v in values if v in found]

    assert held([0.37, 0.38, 0.41, 1.34]) == [0.37, 0.38, 0.41]
    assert held([0.37, 0.38, 0.41, 0.50]) == [0.37, 0.38, 0.41, 0.50]
    assert held([0.4, 1.30, 1.34, 1.36]) == [0.4, 1.30, 1.34, 1.36], "the best one is never left out"
    assert held([0.66, 0.62, 0.60, 0.05], higher=True) == [0.66, 0.62, 0.60]
    assert held([0.37, 1.34], width=0.01) == [0.37, 1.34], "two have nobody to squeeze"
    assert held([0.37, 0.38, 0.41, 1.34], width=0.4) == [0.37, 0.38, 0.41, 1.34], "intervals are as wide as that"
    assert held([0.5, 0.5, 0.51, 0.52]) == [0.5, 0.5, 0.51, 0.52], "two that are alike do not make the rest far"
    assert held([0.37, math.nan, 0.38, math.inf]) == [0.37, 0.38]
    assert scales.shown([], higher=True) == []


@pytest.mark.parametrize(("collapsed", "written"), [(1.34, "1.3400"), (math.nan, "nan"), (math.inf, "inf")])
def test_a_method_that_collapsed_is_named_at_the_edge_and_does_not_squeeze_the_others(collapsed, written):
    rows = table.build([judged_by_loss(dict(zip(FEW, (0.37, 0.38, 0.41, collapsed), strict=True)))])
    row = next(row for row in rows if row.label == "ia3")
    found = charts.scatter(rows, KEY)
    assert [name for name in FEW if not found.holds(name)] == ["ia3"]
    assert (found.y.at(0.41) - found.y.at(0.37)) > 0.4, "the others have most of the scale"
    figure = charts.tradeoff(rows, KEY)
    for drawing in (figure.svg, figure.narrow):
        assert re.search(rf'<text class="label (end )?series {row.css}"[^>]*>▲ ia3 {written}<title>ia3: ', drawing)
        assert len(re.findall(rf'class="dot series {row.css}"', drawing)) == 0
        assert len(re.findall(r'class="dot series ', drawing)) == 3
    assert "Arrows at the edge" in figure.note
    forest = charts.differences(rows)[0]
    assert forest.key == "lora r=8"
    ticks = [float(tick) for tick in re.findall(r'class="tick middle"[^>]*>([-+.\d]+)<', forest.svg)]
    assert max(ticks) < 0.1
    assert re.search(r">\+?(0\.97|nan|inf)\d* \(", forest.svg)
    in_short = r">\+(0\.9700|nan \(.*?\)|inf \(.*?\)) ▶<title>"
    assert re.search(in_short, forest.narrow), "an interval without room is in the tip"


@pytest.mark.parametrize("width", [620.0, NARROW[0]])
def test_ticks_do_not_touch_and_the_title_stays_inside(width):
    x = Axis.over([-0.01, 0.06], "difference of the score (percentage points)", form="{:+.4f}".format)
    plot = Plot("", x, Axis("", 1.5, -0.5), y_names=["lora_plus r=512", "x"], size=(width, 120))
    ends = {"tick middle": [], "axis middle": []}
    for node in plot.root.iter("text"):
        if (css := node.get("class")) in ends:
            middle, half = float(node.get("x")), 3.2 * len(node.text)
            ends[css].append((middle - half, middle + half))
    assert len(ends["tick middle"]) > 1
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ends["tick middle"]))
    ((left, right),) = ends["axis middle"]
    assert left >= 0
    assert right <= width


def test_costs_far_from_all_others_are_named_at_the_edge_too():
    rows = table.build([fabricate(methods=tuple(CLASSIC), failed=False)])
    found = charts.scatter(rows, KEY)
    assert [name for name in CLASSIC if not found.holds(name)] == ["full"]
    assert "full 4,2" in charts.tradeoff(rows, KEY).svg
    assert " MiB ▶<" in charts.tradeoff(rows, KEY).svg
    assert all(found.x.within(x) and found.y.within(y) for x, y in found.outline())


def test_where_all_are_near_nothing_stands_at_the_edge():
    rows = table.build([judged_by_loss(dict(zip(FEW, (0.37, 0.38, 0.41, 0.44), strict=True)))])
    figure = charts.tradeoff(rows, KEY)
    assert "Arrows" not in figure.note
    assert len(re.findall(r"[▲▼◀▶]", figure.svg)) == 1  # the untrained model


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_names_at_the_edge_stand_inside_and_apart_on_desk_and_phone(size):
    plot = Plot("", Axis("", 0, 10), Axis("", 0, 1), size=size)
    points = [(5.0, 3.0), (5.2, 9.0), (9.9, math.inf), (0.1, 3.0), (40.0, 0.95), (8.0, -2.0), (60.0, 0.93)]
    for i, point in enumerate(points):
        plot.dot((point[0], 0.9), "dot")
        plot.beyond(point, f"lora_plus r=51{i} 1.3400", f"series k{i}", brief="1.34")
    labels = []
    for node in plot.root.iter("text"):
        if "label" in node.get("class"):
            x, y, width = float(node.get("x")), float(node.get("y")), 7.0 * len(node.text)
            left = x - width if " end" in node.get("class") else x
            labels.append((left, y - 10, left + width, y + 2))
    assert len(labels) == len(points)
    assert all(left >= plot.left and right <= plot.right + 1 for left, _, right, _ in labels)
    assert not any(
        min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])
        for a, b in itertools.combinations(labels, 2)
    )
