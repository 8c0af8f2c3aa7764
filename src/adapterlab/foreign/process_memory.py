"""The heap of the process: what it holds, and giving back what is free."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil

_LEAST = 64 << 20  # bytes of growth below which giving back is not worth its time
_SHARE = 16  # the same as a part of what the process holds
_READ_IN = 22  # MADV_POPULATE_READ, from Linux 5.14 on
_PRESENT = 63  # bit of a page in /proc/self/pagemap


class Heap:
    """Gives free memory back to the system when the process has grown.

    glibc cuts an aligned block, which is what tensors are, out of a larger one. When it is freed, small blocks may lie
    on both sides, and the hole is just too small to be cut for the next tensor of the same size (sourceware bug 14581).
    A process that makes and frees the same tensors again and again, as recomputation does, so grows by holes: for
    SmolLM2-135M at 1,024 tokens in float32 by four times what is alive. `malloc_trim` returns them. It takes
    milliseconds, and pages that are used again have to be mapped again, so it runs only after growth: of 64 MiB and an
    eighth of the process, over what it held one round after the last time.

    Elsewhere than on Linux with glibc nothing is done.
    """

    def __init__(self) -> None:
        self._mark: int | None = None

    @contextlib.contextmanager
    def tidied(self) -> Iterator[None]:
        """A context that gives back what is free, if that is due, before its inside runs."""
        self.tidy()
        yield

    def tidy(self) -> None:
        """Give back what is free if the process has grown; to be called at the same place of every round."""
        if _malloc_trim() is None:
            return
        held = resident()
        if self._mark is None:
            self._mark = held
        elif held - self._mark > max(_LEAST, held // _SHARE):
            give_back()
            self._mark = None  # what a round takes for itself is not growth: the mark is set after the next one
        else:
            self._mark = min(self._mark, held)


def give_back() -> None:
    """Return free memory of the heap to the system, where the C library can."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return `malloc_trim`, if this process uses glibc."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # Windows knows no library without a name
        return None
    return found


def resident(pid: int | None = None) -> int:
    """Resident memory of a process now, of this one by default; 0 when it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def resident_of_all(pid: int) -> int:
    """Resident memory of a process and of those that it started."""
    try:
        started = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return 0
    return resident(pid) + sum(resident(process.pid) for process in started)


def pages_of_files() -> list[tuple[int, int]]:
    """Return address and length of what this process (on Linux) has in memory of files, programs among them."""
    size, found = os.sysconf("SC_PAGE_SIZE"), []
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            where, access, _, _, node, *_ = line.split(maxsplit=5)
            if node == "0" or not access.startswith("r"):
                continue
            start, end = (int(address, 16) // size for address in where.split("-"))
            pages.seek(8 * start)
            entries = np.frombuffer(pages.read(8 * (end - start)), np.uint64)
            there = np.flatnonzero(entries >> np.uint64(_PRESENT))
            for run in np.split(there, np.flatnonzero(np.diff(there) > 1) + 1) if there.size else ():
                found.append(((start + int(run[0])) * size, len(run) * size))
    return found


def read_in(pages: Sequence[tuple[int, int]]) -> None:
    """Have pages of files in memory, as the process has that this one was forked from: a fork leaves them out.

    What is there already stays as it is. Without it a forked process seems to take less than one that was started.
    """
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for address, length in pages:
        advise(address, length, _READ_IN)
