"""How long work reports where it stands."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


def counter(progress: Progress, phase: str, total: int) -> Callable[[int], None]:
    """Return a function that adds to what is done in one phase and reports it.

    Args:
        progress: receives the reports.
        phase: name of the phase.
        total: how much there is to do.
    """
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(phase, done, total)

    progress(phase, 0, total)
    return advance
