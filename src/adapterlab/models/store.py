"""Model folders that adapterlab writes itself: whole or not at all, with a manifest that proves it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.progress import Progress
from safetensors import SafetensorError

from adapterlab.errors import AdapterlabError, OutputError
from adapterlab.json_text import parsed
from adapterlab.models.progress import phase

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


def hashes(paths: Iterable[Path], text: str, progress: Progress) -> list[str]:
    """Compute the sha256 of each file, as one phase of the display."""
    files, found, done = list(paths), [], 0
    with phase(progress, text, sum(path.stat().st_size for path in files)) as advance:
        for path in files:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(_CHUNK):
                    digest.update(block)
                    advance(done := done + len(block))
            found.append(digest.hexdigest())
    return found


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read a folder's manifest; None when there is none or it cannot be read."""
    try:
        manifest = parsed((folder / MANIFEST).read_text())
        return manifest if isinstance(manifest["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_complete(folder: Path, origin: dict[str, Any]) -> bool:
    """Check a folder against its manifest by names and sizes, and that it was made from `origin`."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("origin") != origin:
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == facts["bytes"]
        for name, facts in manifest["files"].items()
    )


def damaged_files(folder: Path, progress: Progress) -> list[str]:
    """Hash every file that the manifest names and return those that are missing or differ."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [MANIFEST]
    expected = {name: facts["sha256"] for name, facts in manifest["files"].items()}
    there = [name for name in expected if (folder / name).is_file()]
    found = dict(zip(there, hashes([folder / name for name in there], "Verifying", progress), strict=True))
    return [name for name in expected if found.get(name) != expected[name]]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time write `folder`; the others wait."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        lock.acquire()
    except OSError as error:
        raise OutputError(
            f"{str(folder.parent)!r} cannot be written: {error.strerror or error}. "
            "Set ADAPTERLAB_HOME to a folder you may write to."
        ) from error
    try:
        _recover(folder)
        yield
    finally:
        lock.release()


def _recover(folder: Path) -> None:
    """Clear away what killed processes left; where one died between its two last steps, finish them."""
    for scratch in folder.parent.glob(f".{folder.name}.tmp-*"):
        whole = [place for place in (scratch / "new", scratch / "old") if read_manifest(place) is not None]
        if whole and not folder.exists():
            os.replace(whole[0], folder)
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def replacing(folder: Path, origin: dict[str, Any], needed: int, progress: Progress) -> Iterator[Path]:
    """Build a folder beside its final place and move it there when it is complete.

    Call it inside `locked`. An earlier folder stays until the new one is ready; after an error nothing is left.

    Args:
        folder: the final place.
        origin: what the files are made from; written into the manifest.
        needed: bytes of disk that the work takes at its peak.
        progress: the display.

    Yields:
        An empty folder to fill with the final files.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    _check_space(folder.parent, needed)
    scratch = folder.parent / f".{folder.name}.tmp-{uuid.uuid4().hex}"
    try:
        fresh = scratch / "new"
        fresh.mkdir(parents=True)
        yield fresh
        _seal(fresh, origin, progress)
        if folder.exists():
            os.replace(folder, scratch / "old")
        os.replace(fresh, folder)
    except (OSError, SafetensorError) as error:
        if isinstance(error, AdapterlabError) or not (reason := _disk_problem(error)):
            raise
        raise OutputError(
            f"{str(folder)!r} could not be written: {reason}. Making it takes {needed / 1e6:,.0f} MB of disk. "
            "Make room, or set ADAPTERLAB_HOME to a folder on another disk."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _disk_problem(error: Exception) -> str | None:
    """Say what is wrong with the disk, if it is the disk."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
            return os.strerror(code)
    return None


def _check_space(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"Not enough disk space in {str(parent)!r}: {needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are "
            "free. Make room, or set ADAPTERLAB_HOME to a folder on another disk."
        )


def _seal(folder: Path, origin: dict[str, Any], progress: Progress) -> None:
    """Flush all files to disk and write the manifest last, so that its presence means completeness."""
    paths = sorted(folder.iterdir())
    for path in paths:
        shutil.copymode(folder / "config.json", path)  # weights are saved readable by their owner alone
        _flush(path)
    digests = hashes(paths, "Recording checksums", progress)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest} for path, digest in zip(paths, digests, strict=True)
    }
    manifest = {"format": 1, "origin": origin, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    _flush(folder / MANIFEST)


def _flush(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())
