"""What fits, and what to change first when it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapterlab.core.method import Method
from adapterlab.errors import AdapterlabError, ConfigError
from adapterlab.plan.child import each
from adapterlab.plan.child import processes as child_processes
from adapterlab.plan.parallel import Parallel
from adapterlab.plan.planning import TOKENS, USUAL, described, make_method, near, plan, setup_of, trace_of
from adapterlab.plan.result import Plan

_TRIES = 10
_COUNTS = (2, 4, 8, 16, 32, 64)  # devices to look for room on
_DIVIDED = "fewest devices"
_DEALT = {"ddp": "fsdp", "zero2": "zero3"}  # which deal out weights too
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


@dataclass(frozen=True)
class Outlook:
    """What else a device allows.

    Attributes:
        batch: the largest one; 0 if none fits, None if the memory is not known.
        length: likewise, in steps of 64 tokens.
        changes: the possible ones, the largest saving first, then the impossible ones with the reason.
    """

    batch: int | None
    length: int | None
    changes: list[Change]


def outlook(
    model: Any,
    method: Any = USUAL,
    *,
    base: Plan | None = None,
    processes: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Outlook:
    """Find the largest batch and length and plan the usual remedies, in child processes.

    Args:
        model: as for `plan`.
        method: as for `plan`.
        base: the plan to compare with, where it is known.
        processes: at once; None is one for two cores, and two at least.
        progress: told (what, done, total).
        options: of `plan`.
    """
    made = make_method(method)
    start = base or plan(model, made, **options)
    searches = {"largest batch": largest_batch, "largest length": largest_length}
    jobs: dict[str, Any] = {
        key: (search, (model, made), {**options, "base": start}) for key, search in searches.items()
    }
    jobs |= _remedies(start, model, made, options) | _more_devices(start, model, made, options)
    tell = progress or (lambda what, done, total: None)
    tell("limits and remedies", 0, len(jobs))
    found, errors = each(
        jobs, processes or child_processes(), lambda _, done: tell("limits and remedies", done, len(jobs))
    )
    batch, length = (found.pop(key, None) for key in searches)
    for key in searches:
        if key in errors:
            raise errors[key]
    return Outlook(batch, length, _sorted(start, found, errors))


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
    found: dict[str, Plan] = {}
    errors: dict[str, AdapterlabError] = {}
    for what, (function, args, given) in (
        _remedies(start, model, made, options) | _more_devices(start, model, made, options)
    ).items():
        try:
            found[what] = function(*args, **given)
        except AdapterlabError as error:
            errors[what] = error
    return _sorted(start, found, errors)


def _sorted(start: Plan, found: Mapping[str, Plan], errors: Mapping[str, AdapterlabError]) -> list[Change]:
    possible = [
        Change(_named(what, one), start.process - one.process, one.flops / start.flops if start.flops else 1.0, one)
        for what, one in found.items()
    ]
    reasons = [Change(what, reason=str(error).splitlines()[0]) for what, error in errors.items()]
    return sorted(possible, key=lambda change: -change.saving) + reasons


def _remedies(start: Plan, model: Any, method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of each remedy by name: function, arguments, keyword arguments."""
    given = _numbers(options, start)
    return {
        what: (near, (start, model, other), {**given, **new}) for what, new, other in _what_may_change(start, method)
    }


def _more_devices(start: Plan, model: Any, method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """The search for as many devices as are enough, where those there are do not; called as those of `_remedies`."""
    if start.verdict in ("fits", "unknown") or start.quantize:
        return {}
    given = {**_numbers(options, start), "parallel": _DEALT.get(start.parallel or "", start.parallel or "fsdp")}
    given.pop("devices", None)
    return {_DIVIDED: (fewest_devices, (start, model, method), given)}


def fewest_devices(start: Plan, model: Any, method: Any = USUAL, *, parallel: str = "fsdp", **options: Any) -> Plan:
    """Plan a step divided among as few devices as it fits on, a power of two.

    Args:
        start: a plan of it that does not fit, on the device to plan for.
        model: as for `plan`.
        method: as for `plan`.
        parallel: how it is divided.
        options: of `plan`, without a device.

    Raises:
        ConfigError: it does not fit even so; the message says what remains.
    """
    setup = setup_of(model, method, **{**options, "kind": start.device.kind, "devices": 2, "parallel": parallel})
    trace = trace_of(setup, None if start.simulated == len(start.layers) else 2)
    counts = [count for count in _COUNTS if start.parallel != parallel or count > start.devices]
    for count in counts or [2 * start.devices]:
        division = Parallel.parse(count, parallel, options.get("link"))
        found = described(start.model, replace(setup, parallel=division), trace, start.device.one)
        if found.verdict == "fits":
            return found
    raise ConfigError(
        f"does not fit with {parallel} over {found.devices} devices either: each needs {found.process / 2**30:.1f} "
        f"GiB, of which {sum(found.layers) / 2**30:.1f} are activations. Recompute, or lower batch or length."
    )


def _named(what: str, found: Plan) -> str:
    return f"devices: {found.devices}, parallel: {found.parallel}" if what == _DIVIDED else what


def _numbers(options: Mapping[str, Any], start: Plan) -> dict[str, Any]:
    """Options of `plan` for a plan like a known one, on the same device."""
    kept = {key: value for key, value in options.items() if key not in ("device", "speed")}
    numbers = ("batch", "length", "precision", "quantize", "recompute")
    return {**{name: getattr(start, name) for name in numbers}, **kept}


def _what_may_change(start: Plan, method: Method) -> list[tuple[str, dict[str, Any], Method]]:
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
    return _largest(model, method, base, options, "batch", 1, MOST)


def largest_length(model: Any, method: Any = USUAL, *, base: Plan | None = None, **options: Any) -> int | None:
    """Return the largest length, in steps of 64 tokens, that fits with the same batch; else as `largest_batch`."""
    return _largest(model, method, base, options, "length", 64, LONGEST)


def _largest(
    model: Any, method: Any, base: Plan | None, options: Mapping[str, Any], field: str, unit: int, end: int
) -> int | None:
    """The largest multiple of a unit that fits."""
    made = make_method(method)
    start = base or plan(model, made, **options)
    if start.limit is None:
        return None
    given = _numbers(options, start)
    end = min(end, TOKENS // (start.batch * start.length // getattr(start, field)))

    def needs(count: int) -> int:
        return near(start, model, made, **{**given, field: count * unit}).process

    now, rest = divmod(getattr(start, field), unit)
    return unit * _crossing(needs, {now: start.process} if now and not rest else {}, start.limit, end // unit)


def _crossing(needs: Callable[[int], int], known: dict[int, int], limit: int, last: int) -> int:
    """The largest count that needs no more than the limit: memory grows with it, almost on a line.

    Args:
        needs: bytes by count.
        known: some of them; grows.
        limit: bytes.
        last: where the search ends.
    """
    if not any(size <= limit for size in known.values()):
        known[1] = needs(1)
        if known[1] > limit:
            return 0
    for _ in range(_TRIES):
        low = max(n for n, size in known.items() if size <= limit)
        above = [n for n, size in known.items() if size > limit]
        high = min(above) if above else None
        if low >= last or (high is not None and high - low <= max(1, low // 100)):
            return min(low, last)
        guess = _guess(known, low, high, limit, last)
        expected = _line(known, low, guess)
        known[guess] = needs(guess)
        # Where the line told the truth, it also tells that one more is too much.
        doubt = 2 * abs(known[guess] - expected) if expected is not None else limit
        more = _line(known, guess, guess + max(1, guess // 100))
        if known[guess] <= limit and more is not None and more - doubt > limit:
            return guess
    return max(n for n, size in known.items() if size <= limit)


def _line(known: Mapping[int, int], low: int, count: int) -> float | None:
    """What the line through a known point and the one nearest to it says of a count."""
    other = min((n for n in known if n != low), key=lambda n: abs(n - low), default=None)
    if other is None:
        return None
    return known[low] + (count - low) * (known[other] - known[low]) / (other - low)


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
