"""Writes that either happen completely or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterlab.errors import OutputError
from adapterlab.io.disk import LOCK, OLD, PART, alone, content, explained, left_behind, sync, tidy
from adapterlab.json_text import parsed
from adapterlab.paths import user_path

_HEAD = 4096  # bytes of a file in which its maker is named


@dataclass(frozen=True)
class Kind:
    """A sort of folder that adapterlab writes. Asked to overwrite, it replaces such a folder and no other.

    Attributes:
        name: for messages, such as "an adapter".
        marks: files of which at least one is there.
        holds: names of what may be there.
        listing: the file among them that names further ones, as a JSON list under "files".
    """

    name: str
    marks: tuple[str, ...]
    holds: tuple[str, ...]
    listing: str | None = None

    def foreign(self, folder: Path) -> list[str]:
        """Name what does not belong into a folder of this sort; everything where the folder is of another one."""
        there = content(folder)
        if not set(self.marks) & set(there):
            return there
        return [name for name in there if name not in self.holds and name not in self._listed(folder)]

    def _listed(self, folder: Path) -> list[str]:
        try:
            text = (folder / self.listing).read_text(encoding="utf-8") if self.listing else "{}"
            return list(parsed(text)["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return []


@contextlib.contextmanager
def new_folder(final: Path, *, overwrite: bool = False, kind: Kind | None = None) -> Iterator[Path]:
    """Fill a temporary folder beside `final`, then put it in its place in one step.

    Args:
        final: the folder to make.
        overwrite: replace a folder that is there and not empty.
        kind: the sort of folder that may be replaced; None: whatever is there is the caller's own.

    Raises:
        OutputError: it is not empty, of another kind, written by another process, cannot be written, or the disk is
            full. What was there stays as it was.
    """
    final = user_path(final).absolute()
    _check_protected(final)
    with explained(final):
        final.parent.mkdir(parents=True, exist_ok=True)
    with alone(final, beside=True):
        tidy(final.parent, final.name)
        _check(final, overwrite, kind)
        with explained(final):
            work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=PART, dir=final.parent))
        try:
            with explained(final):
                yield work
                for file in work.rglob("*"):
                    if file.is_file():
                        sync(file)
                work.chmod(0o777 & ~_umask())
                _check(final, overwrite, kind)  # again: not everyone asks for the lock
                _put(work, final)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def _put(work: Path, final: Path) -> None:
    """Put a folder in its place. Killed between the two renames, the next writer puts the old one back."""
    old = work.with_suffix(OLD)
    if final.exists():
        final.rename(old)
    try:
        work.rename(final)
        sync(final.parent)
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
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
                sync(file)
            for file in files:
                final = folder / file.relative_to(work)
                final.parent.mkdir(parents=True, exist_ok=True)
                file.replace(final)
        sync(folder)


def check_free(
    final: Path, *, overwrite: bool = False, kind: Kind | None = None, inputs: Sequence[str | Path | None] = ()
) -> None:
    """Check that a folder may be written.

    Args:
        final: the folder.
        overwrite: it may be there already.
        kind: the sort of folder that may be replaced; None: whatever is there is the caller's own.
        inputs: what the new folder is made from: never replaced. Those that are no paths are passed over.

    Raises:
        OutputError: it is a file, another process writes it, or it holds something and is not to be replaced, or must
            not be.
    """
    final = user_path(final).absolute()
    if not final.exists() and left_behind(final):
        with alone(final, beside=True):
            tidy(final.parent, final.name)
    _check(final, overwrite, kind, inputs)


def _check(final: Path, overwrite: bool, kind: Kind | None, inputs: Sequence[str | Path | None] = ()) -> None:
    if final.is_file():
        raise OutputError(f"{final} is a file; an output folder is needed. Choose another path.")
    if (final / LOCK).exists():
        with alone(final):  # it is free, or this raises
            pass
    there = content(final)
    if there and not overwrite:
        raise OutputError(
            f"The folder {final} is not empty, and nothing is overwritten unless asked. Choose another folder, or "
            "pass overwrite (--overwrite on the command line)."
        )
    if there:
        _check_protected(final)
        _check_replaceable(final, kind, inputs)


def check_made_here(file: Path) -> None:
    """Check that a file is not there, or names adapterlab as what made it, so that it may be replaced.

    Raises:
        OutputError: it is somebody else's.
    """
    if not os.path.lexists(file):
        return
    with explained(file), file.open("rb") as stream:
        ours = b"adapterlab" in stream.read(_HEAD)
    if not ours:
        raise OutputError(f"{file} is there already and not from adapterlab, so it is left alone. Choose another name.")


def _check_protected(final: Path) -> None:
    for name, place in {"the home folder": Path(os.path.expanduser("~")), "the working directory": Path.cwd()}.items():
        if place.resolve().is_relative_to(final.resolve()):
            raise OutputError(f"{final} is or holds {name}, and is never replaced. Choose a folder of its own.")


def _check_replaceable(final: Path, kind: Kind | None, inputs: Sequence[str | Path | None]) -> None:
    for given in inputs:
        place = user_path(given) if given else None
        if place is not None and place.exists() and place.resolve().is_relative_to(final.resolve()):
            raise OutputError(
                f"{final} is or holds {given}, which is read here, and is never replaced. Choose another folder."
            )
    foreign = kind.foreign(final) if kind else []
    if kind and foreign:
        more = ", ..." if len(foreign) > 4 else ""
        raise OutputError(
            f"Only {kind.name} that adapterlab wrote is overwritten here, and {final} holds something else "
            f"({', '.join(foreign[:4])}{more}). Its content is left alone. Choose another folder."
        )


class Sealed(io.BufferedWriter):
    """A file that knows the SHA-256 of what was written into it."""

    def __init__(self, raw: io.FileIO):
        super().__init__(raw)
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write bytes."""
        self._digest.update(data)
        return super().write(data)

    def hexdigest(self) -> str:
        """The checksum so far."""
        return self._digest.hexdigest()


@contextlib.contextmanager
def new_file(file: Path) -> Iterator[Sealed]:
    """Fill a temporary file beside `file`, then put it in its place in one step, once it is on the disk.

    Raises:
        OutputError: it cannot be written. What was there stays as it was.
    """
    with explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=PART, dir=file.parent)
        part = Path(name)
        try:
            with Sealed(io.FileIO(handle, "wb")) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            part.chmod(0o666 & ~_umask())
            part.replace(file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        OutputError: it cannot be written.
    """
    with new_file(user_path(file)) as stream:
        stream.write(text.encode())


def json_text(value: Any) -> str:
    """What `write_json` writes: indented, keys in their order."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in their order."""
    write_text(file, json_text(value))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
