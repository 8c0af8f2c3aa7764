"""Numbers as people read them."""

from __future__ import annotations

import math

MISSING = "–"


def count(value: float) -> str:
    """A whole number with separators: 1,234,567."""
    return f"{value:,.0f}"


def short(value: float) -> str:
    """A number with a letter for its magnitude: 1.2 M."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{_three(value / size)} {letter}"
    return _three(value)


def size(value: float) -> str:
    """Bytes in binary units: 36.5 MiB, 1,490 MiB, 22.1 GiB."""
    # Figures of one column stay in one unit up to 10 GiB.
    for least, unit, name in ((10 * 2**30, 2**30, "GiB"), (2**20, 2**20, "MiB"), (2**10, 2**10, "KiB")):
        if abs(value) >= least:
            return f"{_three(value / unit)} {name}"
    return f"{value:.0f} B"


def time(seconds: float) -> str:
    """A duration: 0.82 s, 41 s, 3 min 05 s, 2 h 10 min."""
    if seconds == 0:
        return "0 s"
    if seconds < 0.1:
        return f"{_three(1000 * seconds)} ms"
    if seconds < 60:
        return f"{_three(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(value: float) -> str:
    """A share: 61.5 %."""
    return f"{100 * value:.1f} %"


def share(value: float) -> str:
    """A share that can be tiny, with two significant digits: 0.034 %."""
    digits = max(0, 1 - math.floor(math.log10(100 * value))) if value > 0 else 0
    return f"{100 * value:.{digits}f} %"


def points(value: float) -> str:
    """A difference of two shares, in percentage points: +4.0."""
    return f"{100 * value:+.1f}"


def loss(value: float) -> str:
    """Nats a token: 0.1234."""
    return f"{value:.4f}"


def signed(value: float) -> str:
    """A difference of losses: +0.1234."""
    return f"{value:+.4f}"


def factor(value: float) -> str:
    """A ratio: 1.07 ×."""
    return f"{value:.2f} ×"


def rate(value: float) -> str:
    """A learning rate: 1e-3, 2.5e-4."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def plain(value: float) -> str:
    """A number as short as it can be."""
    return f"{value:g}"


def _three(value: float) -> str:
    magnitude = abs(value)
    return f"{value:,.0f}" if magnitude >= 100 else f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}"
