"""Charts as inline SVG. Colours come from the page's style sheet, so one drawing serves light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree.ElementTree import Element, SubElement, tostring

Point = tuple[float, float]

Size = tuple[float, float]

# Drawn at about their own size: on a desk, on a phone, and where many stand side by side.
WIDE, NARROW, SMALL = (560.0, 360.0), (330.0, 380.0), (330.0, 250.0)
_LEFT, _RIGHT, _TOP, _BOTTOM = 72.0, 16.0, 14.0, 52.0
_LETTER = 7.4  # width of a bold letter at the font size of the style sheet
_THIN = 6.4  # width of a letter that is not bold
_LINE = 15.0  # height of a label
_NEAR = 12.0  # distance up to which a label needs no line to its mark
_STACKED = 8  # names over each other at one place of an edge, at most


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale.

    Attributes:
        label: with the unit.
        low: value at the start.
        high: value at the end.
        log: logarithmic; both ends are positive then.
        form: writes a value at a tick.
    """

    label: str
    low: float
    high: float
    log: bool = False
    form: Callable[[float], str] = "{:g}".format

    @classmethod
    def over(
        cls, values: Iterable[float], label: str, *, log: bool = False, form: Callable[[float], str] = "{:g}".format
    ) -> Axis:
        """Make an axis that holds all the values, with a little room; a lone value gets room around it."""
        known = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
        low, high = min(known), max(known)
        if log:
            room = (high / low) ** 0.06 if high > low else 2.0
            return cls(label, low / room, high * room, True, form)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(label, max(0.0, low - room) if low >= 0 else low - room, high + room, False, form)

    def at(self, value: float) -> float:
        """Return where a value lies: 0 at the start, 1 at the end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: float) -> bool:
        """Say whether a value can be drawn."""
        return math.isfinite(value) and (value > 0 or not self.log)

    def within(self, value: float) -> bool:
        """Say whether a value lies between the ends, whichever is the larger one."""
        return min(self.low, self.high) <= value <= max(self.low, self.high)

    def clamped(self, value: float) -> float:
        """Return the value between the ends that is nearest to a value."""
        return min(max(value, min(self.low, self.high)), max(self.low, self.high))

    def ticks(self, about: int = 5) -> list[float]:
        """Return round values between the ends."""
        if self.log and self.high / self.low >= 8:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            decades = math.log10(self.high / self.low)
            steps = (1,) if decades > 3 else (1, 3) if decades > 1.3 else (1, 2, 5)
            found = [float(f"{step}e{power}") for power in powers for step in steps]
        else:
            raw = (self.high - self.low) / about
            power = 10.0 ** math.floor(math.log10(raw))
            step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
            found = [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [float(f"{tick:.10g}") for tick in found if self.low <= tick <= self.high]


class Plot:
    """A drawing area with two axes.

    Args:
        title: what a screen reader says.
        x: horizontal axis.
        y: vertical axis.
        y_names: names in rows instead of a vertical scale, from the top; row i lies at y = i.
        size: width and height of the whole drawing, in units of the view box.
        aside: letters for which there is room to the right of the area; longer names are cut off there.
    """

    def __init__(
        self,
        title: str,
        x: Axis,
        y: Axis,
        *,
        y_names: Sequence[str] | None = None,
        size: Size = WIDE,
        aside: int = 0,
    ):
        self.x, self.y, self.aside = x, y, aside
        width, height = size
        self.width = width
        widest = max((len(name) for name in y_names or ()), default=0)
        self.left = _LEFT if y_names is None else min(0.42 * width, 16 + _LETTER * widest)
        self.right, self.top, self.bottom = width - _RIGHT - _LETTER * aside, _TOP, height - _BOTTOM
        self.root = Element("svg", viewBox=f"0 0 {width:g} {height:g}", role="img")
        self.root.set("aria-label", title)
        self._taken: list[tuple[float, float, float, float]] = []  # boxes of dots and labels: left, top, right, bottom
        self._frame(y_names)

    def line(self, points: Iterable[Point], css: str, tip: str = "", *, clear: bool = False) -> None:
        """Draw a line through the points that can be drawn; `clear` keeps labels off it."""
        places = self._places(points)
        if places:
            self._add("polyline", css, tip, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places))
        for (x, y), (u, v) in pairwise(places) if clear else ():
            self._taken.append((min(x, u) - 1, min(y, v) - 1, max(x, u) + 1, max(y, v) + 1))

    def band(self, low: Iterable[Point], high: Iterable[Point], css: str) -> None:
        """Fill the area between two lines."""
        around = [*self._places(low), *reversed(self._places(high))]
        if around:
            self._add("polygon", css, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in around))

    def dot(self, point: Point, css: str, tip: str = "", shape: int = 0, size: float = 5.0) -> None:
        """Draw a mark; `shape` chooses circle, square, triangle or diamond."""
        for x, y in self._places([point]):
            mark(self.root, x, y, css, tip, shape, size)
            self._taken.append((x - size, y - size, x + size, y + size))

    def label(self, point: Point, text: str, css: str) -> None:
        """Write a name beside a point, where it covers the least of what is there. Draw all else first."""
        width, middle = _LETTER * len(text), _LINE / 2
        for x, y in self._places([point]):
            # Anchor, left end of the box, and where the text is anchored; near places come first and win a draw.
            sides = (("start", x + 8, x + 8), ("end", x - 8 - width, x - 8), ("middle", x - width / 2, x))
            places = [
                (anchor, (left, y + down - middle, left + width, y + down + middle), at)
                for far in (0, 10, 20, 30)
                for anchor, left, at in sides
                for down in (sorted({-far, far}) if anchor != "middle" else (-16 - far, 16 + far))
            ]
            anchor, box, at = min(places, key=lambda place: self._cost(place[1]))
            self._taken.append(box)
            self._leader((x, y), box, css)
            self._text(at, box[3] - 4, text, f"label {anchor} {css}")

    def ends(self, named: Iterable[tuple[Point, str, str]]) -> None:
        """Write names to the right of the area, each beside the end of its line and none over another.

        Args:
            named: the last point of each line, its name and its style.
        """
        placed = sorted(((y, x, text, css) for point, text, css in named for x, y in self._places([point])))
        room = self.bottom - self.top
        step = min(_LINE, room / max(1, len(placed)))
        free = self.top + step / 2
        heights: list[float] = []
        for y, *_ in placed:
            heights.append(max(y, free))
            free = heights[-1] + step
        for below, i in enumerate(
            reversed(range(len(heights)))
        ):  # what would stand below the area pushes the others up
            heights[i] = min(heights[i], self.bottom - step * below)
        for (y, x, text, css), at in zip(placed, heights, strict=True):
            self._add("polyline", f"leader {css}", points=f"{x:.1f},{y:.1f} {self.right + 4:.1f},{at:.1f}")
            name = text if len(text) <= self.aside else f"{text[: self.aside - 1]}…"
            self._text(self.right + 7, at + 4, name, f"label {css}")

    def beyond(self, point: Point, text: str, css: str, *, brief: str = "", tip: str = "") -> None:
        """Name a point outside the area at the edge that is nearest to it, with an arrow that points there.

        Draw marks first: the name goes where it covers the least of what is there.

        Args:
            point: infinite coordinates count as far outside.
            text: beside the arrow; "" for an arrow alone.
            css: its style.
            brief: stands there instead where the text has no room in the area.
            tip: what is said more.
        """
        arrow = arrow_to(point, self.x, self.y)
        room = self.right - self.left
        text = brief if brief and _LETTER * (len(text) + 2) > room else text
        written = " ".join(filter(None, [text, arrow] if arrow == "▶" else [arrow, text]))
        width = _LETTER * len(written)
        x, y = self._x(self.x.clamped(point[0])), self._y(self.y.clamped(point[1]))
        start, end = ("", x + 5, x + 5), ("end ", x - 5 - width, x - 5)
        middle = min(max(x - width / 2, self.left), max(self.left, self.right - width))
        sides = [*((end, start) if x > (self.left + self.right) / 2 else (start, end)), ("", middle, middle)]
        lines = [_LINE * n for n in range(_STACKED)]
        downs = {"▼": [-6 - far for far in lines], "▲": [14 + far for far in lines]}.get(
            arrow, [4 + sign * far for far in lines for sign in (1, -1)]
        )
        places = [
            (anchor, at, (left, y + d - 11, left + width, y + d + 4), y + d)
            for d in downs
            for anchor, left, at in sides
        ]
        anchor, at, box, baseline = min(places, key=lambda place: self._cost(place[2]))
        self._taken.append(box)
        self._leader((x, y), box, css)
        node = self._text(at, baseline, written, f"label {anchor}{css}")
        if tip:
            SubElement(node, "title").text = tip

    def upright(self, value: float, css: str, tip: str = "") -> None:
        """Draw a vertical line through the whole area."""
        self.line([(value, self.y.low), (value, self.y.high)], css, tip)

    def level(self, value: float, css: str, tip: str = "") -> None:
        """Draw a horizontal line through the whole area."""
        self.line([(self.x.low, value), (self.x.high, value)], css, tip)

    def to_html(self) -> str:
        """Return the drawing as an element of a page."""
        return tostring(self.root, encoding="unicode")

    def _leader(self, mark: Point, box: tuple[float, float, float, float], css: str) -> None:
        """Join a mark with its label where that is not beside it."""
        x, y = min(max(mark[0], box[0]), box[2]), min(max(mark[1], box[1]), box[3])
        if math.dist(mark, (x, y)) > _NEAR:
            self._add("polyline", f"leader {css}", points=f"{mark[0]:.1f},{mark[1]:.1f} {x:.1f},{y:.1f}")

    def _x(self, value: float) -> float:
        return self.left + self.x.at(value) * (self.right - self.left)

    def _y(self, value: float) -> float:
        return self.bottom - self.y.at(value) * (self.bottom - self.top)

    def _places(self, points: Iterable[Point]) -> list[Point]:
        return [(self._x(x), self._y(y)) for x, y in points if self.x.holds(x) and self.y.holds(y)]

    def _add(self, tag: str, css: str, tip: str = "", **attributes: str) -> Element:
        node = SubElement(self.root, tag, {"class": css, **attributes})
        if tip:
            SubElement(node, "title").text = tip
        return node

    def _frame(self, y_names: Sequence[str] | None) -> None:
        for tick in self._apart():
            x = self._x(tick)
            self._add("line", "grid", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=f"{self.top:g}", y2=f"{self.bottom:g}")
            self._text(x, self.bottom + 17, self.x.form(tick), "tick middle")
        if y_names is None:
            rows = [(tick, self.y.form(tick)) for tick in self.y.ticks()]
        else:
            rows = [(float(i), name) for i, name in enumerate(y_names)]
        for value, name in rows:
            y = self._y(value)
            self._add("line", "grid", x1=f"{self.left:g}", x2=f"{self.right:g}", y1=f"{y:.1f}", y2=f"{y:.1f}")
            self._text(self.left - 7, y + 4, name, "tick end")
        half = _THIN * len(self.x.label) / 2  # a title that is wider than the area stays inside the drawing
        middle = max(half, min((self.left + self.right) / 2, self.width - half))
        self._text(middle, self.bottom + 41, self.x.label, "axis middle")
        if y_names is None:
            node = self._text(0, 0, self.y.label, "axis middle")
            node.set("transform", f"translate(13 {(self.top + self.bottom) / 2:g}) rotate(-90)")

    def _apart(self) -> list[float]:
        """Ticks of the horizontal axis, so many that their texts do not touch."""
        found: list[float] = []
        for about in (5, 4, 3, 2):
            found = self.x.ticks(about)
            widest = max((len(self.x.form(tick)) for tick in found), default=0)
            if all(self._x(b) - self._x(a) > _THIN * (widest + 1) for a, b in pairwise(found)):
                break
        return found

    def _text(self, x: float, y: float, text: str, css: str) -> Element:
        node = self._add("text", css, x=f"{x:.1f}", y=f"{y:.1f}")
        node.text = text
        return node

    def _cost(self, box: tuple[float, float, float, float]) -> float:
        left, top, right, bottom = box
        outside = max(0, self.left - left) + max(0, right - self.right) + max(0, self.top - top)
        outside += max(0, bottom - self.bottom)
        covered = sum(
            max(0, min(right, r) - max(left, le)) * max(0, min(bottom, b) - max(top, t)) for le, t, r, b in self._taken
        )
        return 50 * outside + covered


def arrow_to(point: Point, x: Axis, y: Axis) -> str:
    """Return the arrow that points from an area to a point outside it: ▲, ▼, ◀ or ▶; up and down come first."""
    if not y.within(point[1]):
        return "▼" if (point[1] < y.low) == (y.low < y.high) else "▲"
    return "◀" if point[0] < x.low else "▶"


def mark(root: Element, x: float, y: float, css: str, tip: str = "", shape: int = 0, size: float = 5.0) -> None:
    """Draw a circle, square, triangle or diamond at a place of the view box."""
    s = size
    if shape % 4 == 0:
        node = SubElement(root, "circle", {"class": css, "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{s:g}"})
    else:
        corners = {
            1: [(-s, -s), (s, -s), (s, s), (-s, s)],
            2: [(0, -1.25 * s), (1.2 * s, s), (-1.2 * s, s)],
            3: [(0, -1.35 * s), (1.35 * s, 0), (0, 1.35 * s), (-1.35 * s, 0)],
        }[shape % 4]
        points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
        node = SubElement(root, "polygon", {"class": css, "points": points})
    if tip:
        SubElement(node, "title").text = tip


def sample(css: str, shape: int) -> str:
    """Return a small drawing of a series' mark, for a legend."""
    root = Element("svg", {"viewBox": "0 0 16 16", "class": "sample", "aria-hidden": "true"})
    mark(root, 8, 8, css, shape=shape)
    return tostring(root, encoding="unicode")
