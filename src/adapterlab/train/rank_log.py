"""What ranks other than the first print: a file for each in the run's folder, and nothing on the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import IO

from adapterlab.train.loop import Listener, Loop
from adapterlab.train.ranks import log_of, rank

_terminal: list[int] = []  # the standard error of before, where it goes into a file now
_wanted: list[RankLog] = []


def say(text: str) -> None:
    """Print a text where a person sees it, whatever the standard streams of this process are."""
    with contextlib.suppress(OSError):
        os.write(_terminal[0] if _terminal else 2, f"{text}\n".encode())


def hidden() -> bool:
    """Whether what this process prints goes into a file."""
    return bool(_terminal)


def hide() -> None:
    """Take the terminal from a rank that has a log, now that others will say what ends it."""
    for log in _wanted:
        log.take()


class RankLog(Listener):
    """Takes the standard streams of a rank other than the first, until its process ends.

    It does so once the first rank learns of errors of this one. What is printed before the run's folder is there goes
    along when it is.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: IO[bytes] | None = None
        if rank() > 0:
            _wanted.append(self)

    def take(self) -> None:
        """Let nothing go to the terminal from here on."""
        if not _terminal:
            _terminal.append(os.dup(2))
            self._write_to(tempfile.TemporaryFile("w+b"))  # noqa: SIM115

    def started(self, loop: Loop) -> None:
        """Go on in the run's folder; a run that is continued adds to its file."""
        if (before := self._file) is None:
            return
        file = self.folder / log_of(rank())
        with contextlib.suppress(OSError):  # on a disk that is full it stays where it is
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.open("ab" if loop.status.step else "wb", buffering=0)
            before.seek(0)
            new.write(before.read())
            self._write_to(new)

    def _write_to(self, file: IO[bytes]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        self._file = file
