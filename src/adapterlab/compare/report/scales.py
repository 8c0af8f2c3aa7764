"""Which values a scale holds, so that one method far from all others does not squeeze them into a corner."""

from __future__ import annotations

import math
from collections.abc import Iterable

from adapterlab.compare.results import Interval

_FAR = 3.0  # widths of what is shown: as far beyond the quartiles "far out" values begin (Tukey, 1977)
_LEAST = 0.1  # of the largest value that is shown: where all are nearly alike, a little more is not far out


def shown(found: Iterable[tuple[float, Interval | None]], *, higher: bool) -> list[float]:
    """Return what a scale should hold: the better half with their intervals, and the others as far as they are near.

    From the better half on, each next one is held while it lies within three widths of what is held so far. What comes
    after that, or is no finite number, is for the edge. The better half always holds the best one, whoever collapsed.

    Args:
        found: a value for each method, with its interval where it has one.
        higher: whether more is better.
    """
    sign = -1.0 if higher else 1.0
    known = sorted((one for one in found if math.isfinite(one[0])), key=lambda one: sign * one[0])
    sure = max(2, math.ceil(len(known) / 2))
    ends: list[float] = []
    for place, (value, interval) in enumerate(known):
        if place >= sure and _apart(sign * value, [sign * end for end in ends]):
            break
        ends += [end for end in (value, *(interval or ())) if math.isfinite(end)]
    return ends


def _apart(value: float, ends: list[float]) -> bool:
    width = max(max(ends) - min(ends), _LEAST * max(abs(end) for end in ends))
    return value - max(ends) > _FAR * width
