"""Results that take the place of earlier ones in the same folder, and not before there is something to take it.

    .adapterlab-next       what is new, until its first result: a kill costs nothing but that
    .adapterlab-arriving   it counts now; what has no successor goes
    .adapterlab-moving     it moves in, entry by entry

Whenever the process ends, `recover` finds one of these and finishes or undoes it. Other files in the folder stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapterlab.io.disk import explained, remove, sync

NEXT, ARRIVING, MOVING = ".adapterlab-next", ".adapterlab-arriving", ".adapterlab-moving"


def begin(folder: Path) -> Path:
    """Make the place for what is new.

    Raises:
        OutputError: it cannot be written.
    """
    with explained(folder):
        remove(folder / NEXT)
        (folder / NEXT).mkdir()
    return folder / NEXT


def arrive(folder: Path, names: Sequence[str]) -> None:
    """Let what is new take the place of what was there.

    Args:
        folder: in which `begin` made a place.
        names: entries that belong to the results; earlier ones without a successor are removed.

    Raises:
        OutputError: the file system refuses.
    """
    with explained(folder):
        (folder / NEXT).rename(folder / ARRIVING)
        sync(folder)
        _move_in(folder, names)


def recover(folder: Path, names: Sequence[str]) -> None:
    """Finish or undo what a killed process left. Call it where nobody else writes.

    Raises:
        OutputError: the file system refuses.
    """
    with explained(folder):
        remove(folder / NEXT)
        _move_in(folder, names)


def _move_in(folder: Path, names: Sequence[str]) -> None:
    new, moving = folder / ARRIVING, folder / MOVING
    if new.is_dir():
        for name in names:
            if not (new / name).exists():
                remove(folder / name)
        new.rename(moving)
    if moving.is_dir():
        for entry in moving.iterdir():
            remove(folder / entry.name)
            entry.rename(folder / entry.name)
        moving.rmdir()
