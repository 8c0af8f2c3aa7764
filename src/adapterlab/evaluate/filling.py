"""Processes that encode rows beside a run: they fill the files of a store, and tell their parent what cannot be used.

They are started as `python -m adapterlab.evaluate.filling`, so a script that trains needs no guard around its main
part. What they get is pickled; only a parent and its own children exchange it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from adapterlab.errors import AdapterlabError
from adapterlab.evaluate.shards import Shard, Shards

_MOST = 4  # processes; a training step needs few rows
_PATIENCE = 5.0  # seconds for a process to tidy up


def helpers() -> int:
    """How many processes encode beside a run: none where there is one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST, cores // 2)


class Filling:
    """Processes that fill a folder.

    Args:
        make: what a file holds, by its number.
        folder: of the files.
        numbers: of the files to make.
    """

    def __init__(self, make: Callable[[int], Shard], folder: Path, numbers: Sequence[int]):
        self._error: AdapterlabError | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        try:
            job = pickle.dumps((make, folder))
        except (pickle.PicklingError, AttributeError, TypeError):
            return  # a tokenizer of a script's own: its process encodes what it needs
        count = helpers()
        for i in range(count):
            child = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
            )  # fmt: skip
            self._children.append(child)
            part = pickle.dumps([*numbers[i::count]])
            threading.Thread(target=self._attend, args=(child, job + part), daemon=True).start()

    def _attend(self, child: subprocess.Popen[bytes], job: bytes) -> None:
        with contextlib.suppress(OSError, ValueError, EOFError, pickle.UnpicklingError):
            answer, _ = child.communicate(job)
            if answer:
                self._error = pickle.loads(answer)

    def heed(self) -> None:
        """Raise what a process met.

        Raises:
            DataError: a row cannot be used.
        """
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the processes; what one of them is writing goes with it."""
        for child in self._children:
            child.terminate()
        for child in self._children:
            try:
                child.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _fill() -> None:
    """Fill what the parent names, and end with it."""
    parent, answers = os.getppid(), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    if hasattr(os, "nice"):
        os.nice(10)
    make, folder = pickle.load(sys.stdin.buffer)
    numbers = pickle.load(sys.stdin.buffer)
    shards = Shards(folder)
    try:
        for number in numbers:
            if os.getppid() != parent or shards.full:
                return
            if not shards.has(number):
                shards.put(number, make(number))
    except AdapterlabError as error:
        answers.write(pickle.dumps(error))
        answers.flush()


if __name__ == "__main__":
    _fill()
