"""What all writing has in common: errors that say what to do, one writer at a time, and no leftovers of killed ones."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from adapterlab.errors import OutputError

LOCK = ".lock"
PART, OLD = ".part", ".old"  # endings of what is being written, and of what is about to be replaced
# `.<name>.<eight random characters of tempfile>.part`: nobody else calls files like this.
_LEFT = re.compile(rf"\.(?P<name>.+)\.[a-z0-9_]{{8}}(?P<ending>{re.escape(PART)}|{re.escape(OLD)})")
# Some network file systems know no locks: there, as everywhere once, two processes must not write one folder.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn errors of the file system into an `OutputError` that says what to do."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        # safetensors reports a full disk as an exception of its own, with the system's text inside.
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.ENOSPC or "No space left" in str(error) or "os error 28" in str(error):
            free = shutil.disk_usage(_existing(target)).free
            raise OutputError(
                f"The disk is full: {target} could not be written ({free / 2**20:.0f} MiB free). Nothing was "
                "changed there. Free some space, or choose a folder on another disk."
            ) from error
        if isinstance(error, OSError):
            raise OutputError(
                f"{target} cannot be written: {error.strerror or error}. Check the path and its permissions, or "
                "choose another folder."
            ) from error
        raise


@contextlib.contextmanager
def alone(folder: Path, *, beside: bool = False, wait: float = 0) -> Iterator[None]:
    """Keep other processes from writing a folder.

    The system holds the lock, so that a killed process leaves at most an empty file behind, which locks nothing.

    Args:
        folder: to write.
        beside: the lock lies beside the folder, which is then replaced as a whole or not there yet; else inside.
        wait: seconds to wait for another process.

    Raises:
        OutputError: another process writes it, or it cannot be written.
    """
    file = folder.with_name(f".{folder.name}{LOCK}") if beside else folder / LOCK
    lock = FileLock(file, timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"Another process is writing {folder}. Wait for it to end, or choose another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            with explained(folder):
                raise
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # whoever waits for it sees that it is gone, and makes another
                file.unlink()
            lock.release()


def tidy(parent: Path, name: str | None = None) -> None:
    """Remove what killed processes left half done in a folder. Call it where nobody else writes.

    What was moved out of the way for a successor that did not arrive goes back to its place.

    Args:
        parent: the folder to look into.
        name: of the one entry whose leftovers are meant; None: all.

    Raises:
        OutputError: they cannot be removed.
    """
    with explained(parent):
        for path, found in _leftovers(parent, name):
            final = parent / found["name"]
            if found["ending"] == OLD and not os.path.lexists(final):
                path.rename(final)
            else:
                remove(path)


def left_behind(final: Path) -> bool:
    """Say whether a writer of this folder left something half done beside it."""
    return final.parent.is_dir() and bool(_leftovers(final.parent, final.name))


def content(folder: Path) -> list[str]:
    """Name what a folder holds, locks and leftovers of killed writers not counted; nothing where there is none."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK and not _LEFT.fullmatch(path.name))


def remove(path: Path) -> None:
    """Remove a file, a link (and not what it leads to) or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _leftovers(parent: Path, name: str | None) -> list[tuple[Path, re.Match[str]]]:
    found = [(path, match) for path in sorted(parent.iterdir()) if (match := _LEFT.fullmatch(path.name))]
    return [(path, match) for path, match in found if name in (None, match["name"])]


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())
