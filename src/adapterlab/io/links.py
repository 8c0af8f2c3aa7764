"""Links inside a folder stay inside: what is read, written or removed by a name in it lies in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from adapterlab.errors import FormatError


def check_links(folder: Path, *names: str) -> None:
    """Refuse a folder in which a link leads out; the folder itself may be a link, and need not be there.

    Args:
        folder: of a run, a comparison or an adapter.
        names: of the files that matter; all of them, at any depth, without.

    Raises:
        FormatError: a link leads out of the folder.
    """
    home = _home(folder.resolve())
    for path in (folder / name for name in names) if names else _entries(folder):
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise FormatError(
                f"{path} is a link to {path.resolve()}, which lies outside of {folder}. Links out of such a folder are "
                "not followed: reading or writing would reach files that were not named. Put the file itself there."
            )


def _entries(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        yield from (Path(where, name) for name in (*folders, *files))


def _home(folder: Path) -> Path:
    """What links may stay within: the folder, or the cache of the hub that it lies in, whose files are links."""
    snapshots = next((p for p in folder.parents if p.name == "snapshots" and (p.parent / "blobs").is_dir()), None)
    return folder if snapshots is None else snapshots.parent
