"""Stop between two steps when the user presses Ctrl-C, the terminal closes, or the system asks the process to end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

Stopping = Callable[[], contextlib.AbstractContextManager[Callable[[], bool]]]
_ECHO = 3.0  # seconds in which a launcher may pass on a signal that came to all processes anyway
_STARTED = ("LOCAL_RANK", "ADAPTERLAB_LIFELINE")  # set where a launcher, or a comparison, passes signals on
_ASKED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and did so after a whole step.

    Attributes:
        step: the last step that was done.
        folder: of the run, where its checkpoint is, or None when nothing was written.
    """

    def __init__(self, step: int, folder: Path | None = None):
        self.step, self.folder = step, folder
        saved = f"; its checkpoint is in {folder}" if folder else ""
        super().__init__(f"Training was interrupted after step {step}{saved}.")


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into an answer "yes" of the function that is given.

    A second one acts at once; in a process that a launcher started, if it is no echo of the first. SIGHUP stays ignored
    where it is already, as under nohup. Outside the main thread, where signals cannot be caught, the answer is always
    "no".
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    echoes = [0.0]  # until when
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            if time.monotonic() > echoes[0]:
                restore()
                signal.raise_signal(number)
            return
        asked.set()
        if any(name in os.environ for name in _STARTED):
            echoes[0] = time.monotonic() + _ECHO
        else:
            restore()

    ignored = {number for number in _ASKED if signal.getsignal(number) is signal.SIG_IGN}
    heeded = [number for number in _ASKED if number.name != "SIGHUP" or number not in ignored]
    before.update({number: signal.signal(number, note) for number in heeded})
    try:
        yield asked.is_set
    finally:
        restore()
