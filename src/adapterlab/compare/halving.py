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
    return [float(f"{centre * factor**k:.3g}") for k in range(-((count - 1) // 2), count // 2 + 1)]


def halve(
    rates: Sequence[float], lengths: Sequence[int], trial: Callable[[float, int], Trial], *, extend: int, factor: float
) -> list[list[Trial]]:
    """Try rates for a short time, let the better half go on for longer, and keep one.

    When the best of the first round lies at an end of the range, rates beyond that end are tried too.

    Args:
        rates: to begin with.
        lengths: steps of each round.
        trial: trains with a rate for a number of steps.
        extend: how many rates may be added.
        factor: from one rate to the next.

    Returns:
        The trials of each round by rising rate; in the last, the chosen one alone is `kept`. A round in which all
        trials fail ends the search with nothing kept.
    """
    rounds: list[list[Trial]] = []
    alive = sorted(rates)
    for number, steps in enumerate(lengths):
        wanted = 1 if number == len(lengths) - 1 else -(-len(alive) // 2)
        trials = [trial(rate, steps) for rate in alive]
        if number == 0:
            trials += _beyond(trials, lambda rate, steps=steps: trial(rate, steps), extend, factor)  # type: ignore[misc]
            trials.sort(key=lambda t: t.lr)
        good = sorted((t for t in trials if t.loss is not None), key=lambda t: (t.loss, t.lr))
        alive = sorted(t.lr for t in good[:wanted])
        rounds.append([t.model_copy(update={"kept": t.lr in alive}) for t in trials])
        if not alive:
            break
    return rounds


def _beyond(trials: Sequence[Trial], trial: Callable[[float], Trial], extend: int, factor: float) -> list[Trial]:
    """Trials beyond the end at which the best one lies."""
    tried, added = list(trials), []
    for _ in range(extend):
        good = [t for t in tried if t.loss is not None]
        if not good:
            break
        best = min(good, key=lambda t: t.loss or 0.0).lr
        low, high = min(t.lr for t in tried), max(t.lr for t in tried)
        if best not in (low, high) or best == 0:
            break
        added.append(trial(float(f"{best * factor if best == high else best / factor:.3g}")))
        tried.append(added[-1])
    return added
