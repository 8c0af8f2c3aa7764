"""Successive halving over learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from adapterlab.compare.results import Trial


def spread(centre: float, count: int, factor: float) -> list[float]:
    """Return rates around a centre, rising; an even number has one more above than below.

    A short search favours high rates less than a full training does, and methods suffer more from too low a rate.

    Args:
        centre: a rate that suits the method.
        count: how many.
        factor: from one to the next.
    """
    return [_rounded(centre * factor**k) for k in range(-((count - 1) // 2), count // 2 + 1)]


def halve(
    rates: Sequence[float],
    lengths: Sequence[int],
    trials_of: Callable[[Sequence[float], int], list[Trial]],
    *,
    extend: int,
    factor: float,
) -> list[list[Trial]]:
    """Try rates for a short time, let the better half go on for longer, and keep one.

    In every round in which the best rate lies at an end of all that were tried, rates beyond that end are tried too,
    until the best one has a neighbour on both sides.

    Args:
        rates: to begin with.
        lengths: steps of each round.
        trials_of: trains with each of some rates for a number of steps.
        extend: how many rates may be added at most, in all rounds together.
        factor: from one rate to the next.

    Returns:
        The trials of each round by rising rate; in the last, the chosen one alone is `kept`. A round in which all
        trials fail ends the search with nothing kept.
    """
    rounds: list[list[Trial]] = []
    alive, tried = sorted(rates), set(rates)
    for number, steps in enumerate(lengths):
        trials = trials_of(alive, steps)
        while len(tried) < len(rates) + extend and (rate := _beyond(trials, tried, factor)) is not None:
            tried.add(rate)
            trials += trials_of([rate], steps)
        trials.sort(key=lambda t: t.lr)
        good = sorted((t for t in trials if t.loss is not None), key=lambda t: (t.loss, t.lr))
        wanted = 1 if number == len(lengths) - 1 else -(-len(alive) // 2)
        alive = sorted(t.lr for t in good[:wanted])
        rounds.append([t.model_copy(update={"kept": t.lr in alive}) for t in trials])
        if not alive:
            break
    return rounds


def _beyond(trials: Sequence[Trial], tried: set[float], factor: float) -> float | None:
    """The rate beyond the end at which the best one lies, if it lies at one; where all failed, the next lower one."""
    good = [t for t in trials if t.loss is not None]
    low, high = min(tried), max(tried)
    best = min(good, key=lambda t: (t.loss, t.lr)).lr if good else low
    if best not in (low, high):
        return None
    found = _rounded(best * factor if best == high else best / factor)
    return None if found in tried else found  # rounding may leave a rate where it is


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
