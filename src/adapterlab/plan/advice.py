"""What fits, and what to change first when it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adapterlab.core.method import Method
from adapterlab.errors import AdapterlabError
from adapterlab.plan.planning import USUAL, make_method, plan
from adapterlab.plan.result import Plan

_TRIES = 10
LONGEST, MOST = 1 << 20, 1 << 14  # where the search for lengths and batches ends


@dataclass(frozen=True)
class Change:
    """One thing to change, and what it brings.

    Attributes:
        what: in words.
        saving: bytes of the process; negative when it needs more.
        slower: factor of the work of a step.
        plan: with the change; None when it cannot be made.
        reason: why it cannot.
    """

    what: str
    saving: int = 0
    slower: float = 1.0
    plan: Plan | None = None
    reason: str = ""


def changes(model: Any, method: Any = USUAL, *, base: Plan | None = None, **options: Any) -> list[Change]:
    """Plan the usual remedies one by one.

    Args:
        model: as for `plan`.
        method: as for `plan`.
        base: the plan to compare with, where it is known.
        options: of `plan`.

    Returns:
        The possible ones, the largest saving first, then the impossible ones with the reason.
    """
    made = make_method(method)
    start = base or plan(model, made, **options)
    found = []
    for what, changed, other in _remedies(start, made):
        try:
            better = plan(model, other, **{**options, "device": start.device, **changed})
        except AdapterlabError as error:
            found.append(Change(what, reason=str(error).splitlines()[0]))
        else:
            slower = better.flops / start.flops if start.flops else 1.0
            found.append(Change(what, start.process - better.process, slower, better))
    return sorted(found, key=lambda change: (change.plan is None, -change.saving))


def _remedies(start: Plan, method: Method) -> list[tuple[str, dict[str, Any], Method]]:
    """What may be changed: words, arguments of `plan`, and the method."""
    found: list[tuple[str, dict[str, Any], Method]] = []
    if start.recompute == "none":
        found.append(("recompute: cheap", {"recompute": "cheap"}, method))
    if start.recompute != "full":
        found.append(("recompute: full", {"recompute": "full"}, method))
    if start.quantize != "nf4":
        found.append(("quantize: nf4", {"quantize": "nf4"}, method))
    if start.quantize is None:
        found.append(("quantize: int8", {"quantize": "int8"}, method))
    if start.precision == "fp32":
        found.append(("precision: bf16", {"precision": "bf16"}, method))
    rank = getattr(method, "r", None)
    if isinstance(rank, int) and rank > 1:
        found.append((f"r: {rank // 2}", {}, method.replace(r=rank // 2)))
    if start.batch > 1:
        half = {"batch": start.batch // 2}
        found.append((f"batch_size: {start.batch // 2}, accumulation doubled", half, method))
    if start.length >= 16:
        found.append((f"max_length: {start.length // 2}", {"length": start.length // 2}, method))
    return found


def largest_batch(model: Any, method: Any = USUAL, *, base: Plan | None = None, **options: Any) -> int | None:
    """Return the largest batch that fits into the device; 0 if none does, None if its memory is not known."""
    made = make_method(method)
    start = base or plan(model, made, **options)
    given = {**options, "device": start.device, "quantize": start.quantize}
    return _largest(start, "batch", 1, MOST, lambda n: plan(model, made, **{**given, "batch": n}))


def largest_length(model: Any, method: Any = USUAL, *, base: Plan | None = None, **options: Any) -> int | None:
    """Return the largest length, in steps of 64 tokens, that fits with the same batch."""
    made = make_method(method)
    start = base or plan(model, made, **options)
    given = {**options, "device": start.device, "quantize": start.quantize}
    return _largest(start, "length", 64, LONGEST, lambda n: plan(model, made, **{**given, "length": n}))


def _largest(start: Plan, field: str, unit: int, end: int, make: Callable[[int], Plan]) -> int | None:
    """The largest multiple of a unit that fits; memory grows with it, almost on a line."""
    limit = start.limit
    if limit is None:
        return None
    known: dict[int, int] = {}

    def needs(count: int) -> int:
        if count not in known:
            known[count] = make(count * unit).process
        return known[count]

    now = max(1, getattr(start, field) // unit)
    if now * unit == getattr(start, field):
        known[now] = start.process
    if needs(1) > limit:
        return 0
    last = end // unit
    for _ in range(_TRIES):
        low = max(n for n, size in known.items() if size <= limit)
        above = [n for n, size in known.items() if size > limit]
        high = min(above) if above else None
        if high is not None and high - low <= max(1, low // 100):
            return low * unit
        if high is None and low >= last:
            return last * unit
        guess = _guess(known, low, high, limit, last)
        needs(guess)
    return max(n for n, size in known.items() if size <= limit) * unit


def _guess(known: dict[int, int], low: int, high: int | None, limit: int, last: int) -> int:
    """Where the line through the two nearest known points crosses the limit."""
    others = sorted((n for n in known if n != low), key=lambda n: abs(n - low))
    other = high if high is not None else others[0] if others else None
    if other is None or known[other] == known[low]:
        return min(last, low * 2)
    slope = (known[other] - known[low]) / (other - low)
    guess = int(low + (limit - known[low]) / slope)
    if high is None:
        return max(low + 1, min(last, guess))
    # A line that ends exactly at the limit would stay on one side: the neighbour decides.
    return guess + 1 if guess == low else max(low + 1, min(high - 1, guess))
