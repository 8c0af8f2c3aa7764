"""How much of encoded rows is kept: what nobody used for long goes, and so does the oldest where there is too much.

Whoever uses a folder holds a lock beside it, shared with others; only a folder whose lock is free is removed. The
system holds the locks, so that a killed process leaves none behind.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from adapterlab.errors import ConfigError

LIMIT = "ADAPTERLAB_ROWS_GIB"  # the most that is kept, in GiB
GIB = 50.0
DAYS = 30  # without use


def limit() -> float:
    """Return how many bytes of encoded rows are kept.

    Raises:
        ConfigError: the environment says something else than a size.
    """
    text = os.environ.get(LIMIT) or str(GIB)
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not size >= 0:
        raise ConfigError(f"{LIMIT}={text!r} is no size. Give the GiB of encoded rows to keep, such as {GIB:g}.")
    return size * 2**30


def use(folder: Path) -> IO[Any] | None:
    """Keep a folder from being removed, as long as what is returned is open.

    Args:
        folder: of encoded rows, there already or not.

    Returns:
        None where files cannot be locked: there nothing is removed either.
    """
    file = _lock_of(folder)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        while (lock := _locked(file, shared=True)) is not None:
            os.utime(lock.fileno())
            if _is_there(lock, file):
                return lock
            lock.close()  # somebody removed the folder and its lock in between
    return None


def prune(root: Path, most: float, days: float = DAYS) -> list[Path]:
    """Remove folders of encoded rows that are not in use.

    Args:
        root: of all these folders.
        most: bytes to keep of those that were used last.
        days: those that were not used for longer go in any case.

    Returns:
        What was removed.
    """
    found = sorted(((_used(folder), folder) for folder in root.glob("[!.]*") if folder.is_dir()), reverse=True)
    kept, removed, now = 0.0, [], time.time()
    for used, folder in found:
        size = _size(folder)
        if (now - used > days * 86400 or kept + size > most) and _remove(folder):
            removed.append(folder)
        else:
            kept += size
    return removed


def _remove(folder: Path) -> bool:
    """Remove a folder that nobody uses; say whether it is gone."""
    file = _lock_of(folder)
    with contextlib.suppress(OSError):
        lock = _locked(file, shared=False)
        if lock is None:
            return False
        with lock:
            if not _is_there(lock, file):
                return False
            away = Path(tempfile.mkdtemp(prefix=".", suffix=".old", dir=folder.parent))
            folder.rename(away / folder.name)  # in one step: nobody finds a half of it
            file.unlink()
        shutil.rmtree(away, ignore_errors=True)
        return True
    return False


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.used")


def _locked(file: Path, *, shared: bool) -> IO[Any] | None:
    """Open and lock a file; None where the system has no such locks, or somebody holds it who does not share."""
    with contextlib.suppress(ImportError):
        fcntl: Any = importlib.import_module("fcntl")
        lock = file.open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise
        return lock
    return None


def _is_there(lock: IO[Any], file: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _used(folder: Path) -> float:
    """When a folder was used last."""
    for place in (_lock_of(folder), folder):
        with contextlib.suppress(OSError):
            return place.stat().st_mtime
    return 0.0


def _size(folder: Path) -> int:
    size = 0
    for file in folder.glob("*"):
        with contextlib.suppress(OSError):  # another process removes it
            size += file.stat().st_size
    return size
