"""A worker that is asked to end: by whoever needs the machine, or since its time is nearly up."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Asked(KeyboardInterrupt):
    """The process was asked to end.

    Attributes:
        for_now: its time is up, and it may be started again.
    """

    def __init__(self, number: int):
        self.for_now = number == _TIME
        super().__init__(f"The process was asked to end (signal {number}).")


_TIME: int | None = getattr(signal, "SIGUSR1", None)


@contextlib.contextmanager
def asked_to_end() -> Iterator[None]:
    """Raise `Asked` at the first SIGTERM, SIGINT or SIGUSR1; later ones are ignored, as it is ending by then."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGINT, _TIME) if number is not None]

    def end(number: int, frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise Asked(number)

    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
