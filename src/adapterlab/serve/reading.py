"""Reads the adapters that requests wait for while the model computes for others."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from adapterlab.io.folder import Saved, read
from adapterlab.serve.adapters import Version


class Reader:
    """One thread that reads files ahead; what it has read lies in memory until it is taken or no longer wanted.

    All methods are called by one thread at a time.
    """

    def __init__(self, most: int):
        """Read ahead so many bytes."""
        self.most = most
        self._pool = ThreadPoolExecutor(1, "adapterlab-reader")
        self._read: dict[int, Future[Saved]] = {}

    def want(self, versions: Iterable[Version]) -> None:
        """Read these, the first ones first, as far as they fit, and forget all others."""
        fitting, room = [], self.most
        for version in versions:
            room -= version.bytes
            if room < 0:
                break
            fitting.append(version)
        for uid in self._read.keys() - {version.uid for version in fitting}:
            self._read.pop(uid).cancel()
        for version in fitting:
            if version.uid not in self._read:
                self._read[version.uid] = self._pool.submit(read, version.folder)

    def is_reading(self, version: Version) -> bool:
        """Whether a version is being read, or will be."""
        found = self._read.get(version.uid)
        return found is not None and not found.done()

    def take(self, version: Version) -> Saved:
        """Return what lies in the folder of a version; read here where it was not read ahead.

        Raises:
            FormatError: it is damaged.
        """
        found = self._read.pop(version.uid, None)
        return read(version.folder) if found is None or found.cancel() else found.result()

    def close(self) -> None:
        """Read nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._read.clear()
