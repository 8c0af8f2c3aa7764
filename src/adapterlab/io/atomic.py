"""Writes that either happen completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterlab.errors import OutputError


@contextlib.contextmanager
def new_folder(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary folder beside `final`, then put it in its place in one step.

    Args:
        final: the folder to make.
        overwrite: replace a folder that is there and not empty.

    Raises:
        OutputError: it is not empty, cannot be written, or the disk is full. What was there stays as it was.
    """
    final = Path(final).absolute()
    check_free(final, overwrite=overwrite)
    with explained(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
    old = work.with_suffix(".old")
    try:
        with explained(final):
            yield work
            for file in work.rglob("*"):
                if file.is_file():
                    _sync(file)
            work.chmod(0o777 & ~_umask())
            if final.exists():
                final.rename(old)
            work.rename(final)
            _sync(final.parent)
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """Fill a temporary folder inside `folder`, then put its files in their places there, each in one step.

    Other files of the folder stay. A folder of files is put in its place file by file too.

    Raises:
        OutputError: it is a file, cannot be written, or the disk is full.
    """
    folder = Path(folder).absolute()
    if folder.is_file():
        raise OutputError(f"{folder} is a file; an output folder is needed. Choose another path.")
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as made:
            work = Path(made)
            yield work
            files = sorted(file for file in work.rglob("*") if file.is_file())
            for file in files:
                file.chmod(0o666 & ~_umask())
                _sync(file)
            for file in files:
                final = folder / file.relative_to(work)
                final.parent.mkdir(exist_ok=True)
                file.replace(final)
        _sync(folder)


def check_free(final: Path, *, overwrite: bool = False) -> None:
    """Check that a folder may be written.

    Raises:
        OutputError: it is a file, or holds something and `overwrite` is false.
    """
    if final.is_file():
        raise OutputError(f"{final} is a file; an output folder is needed. Choose another path.")
    if final.is_dir() and any(final.iterdir()) and not overwrite:
        raise OutputError(
            f"The folder {final} is not empty, and nothing is overwritten unless asked. Choose another folder, or "
            "pass overwrite (--overwrite on the command line)."
        )


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        OutputError: it cannot be written.
    """
    with explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            Path(part).chmod(0o666 & ~_umask())
            Path(part).replace(file)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise


def json_text(value: Any) -> str:
    """What `write_json` writes: indented, keys in their order."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in their order."""
    write_text(file, json_text(value))


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


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
