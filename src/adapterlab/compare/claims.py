"""Who does which job, where several processes on several machines share nothing but a folder.

    claim-0, claim-1, ...    in the folder of a job; the last one counts

A job is taken by making the next file of the row, which the file system lets one process do and no other (O_EXCL, on
network file systems too; no locks). Each file has one writer ever: whoever made it touches it while it works, and then
writes down how that ended. A file that says "held" and is not touched for a while is of somebody who is gone, and the
next file may be made: the job is taken over. Whoever was only held up finds that file, and lets go of the job.

Nothing depends on clocks that agree: the time since the last touch is that since a change was seen.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from adapterlab.io.atomic import write_json
from adapterlab.io.disk import explained

BEAT = 15.0  # seconds between touches
LEASE = 120.0  # seconds without one after which the holder counts as gone: network file systems show files late
_NAME = re.compile(r"claim-(\d+)")


class Note(BaseModel):
    """What a claim says.

    Attributes:
        host: of its maker, for people.
        system: that machine since its start, or a container on it: process numbers mean something within one.
        process: the maker's number, and `started`, when it began: the system gives numbers again.
        state: held while it works; done, free or lost afterwards.
        took_over: how the attempt before was lost, where it was.
        why: how this one was, else "".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "an unknown machine"
    system: str = ""
    process: int = 0
    started: float = 0.0
    state: Literal["held", "done", "free", "lost"] = "held"
    took_over: str = ""
    why: str = ""

    @classmethod
    def mine(cls) -> Note:
        """Return a claim of this process."""
        started = psutil.Process().create_time()
        return cls(host=socket.gethostname(), system=_system(), process=os.getpid(), started=started)

    @property
    def who(self) -> str:
        """The maker, for people."""
        return f"process {self.process} on {self.host}"

    @property
    def is_near(self) -> bool:
        """Whether the maker is of this system, so that its end can be seen; one elsewhere is known by its touches."""
        return self.system == _system()

    def is_dead(self) -> bool:
        """Whether the maker was seen to have ended."""
        if not self.is_near:
            return False
        try:
            return abs(psutil.Process(self.process).create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True)
class _Look:
    """A job as it was found.

    Attributes:
        number: of the claim that counts; -1: there is none.
        note: what it says.
        gone: how it is known that its holder is gone; "" where it may be at work, or there is none.
        alive: whether its holder was seen to be at work.
    """

    number: int = -1
    note: Note | None = None
    gone: str = ""
    alive: bool = False

    @property
    def held(self) -> bool:
        return self.note is not None and self.note.state == "held" and not self.gone


@dataclass(frozen=True)
class _Touch:
    """When this process first saw a claim's time of change, and whether it has seen an earlier one."""

    number: int
    changed: int
    since: float
    moved: bool


class Claims:
    """The claims of one process, and what it sees of those of others.

    Args:
        beat: seconds between touches.
        lease: seconds without a touch after which a holder counts as gone.
    """

    def __init__(self, beat: float = BEAT, lease: float = LEASE):
        self.beat, self.lease, self.me = beat, lease, Note.mine()
        self._mine: dict[Path, tuple[int, float]] = {}  # folder -> number of the claim, when it was touched last
        self._taken_away: set[Path] = set()
        self._touches: dict[Path, _Touch] = {}
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_touching, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let go of everything."""
        self._end.set()
        self._thread.join()
        for folder in list(self._mine):
            self.release(folder)

    # ------------------------------------------------------------------ one's own

    def take(self, folders: Sequence[Path]) -> bool:
        """Claim all of some jobs, or none of them.

        Raises:
            OutputError: a folder cannot be written.
        """
        for count, folder in enumerate(folders):
            with explained(folder):
                taken = self._take(folder)
            if not taken:
                for mine in folders[:count]:
                    self.release(mine)
                return False
        return True

    def _take(self, folder: Path) -> bool:
        found = self._look(folder)
        if found.held:
            return False
        lost = f"{found.note.who} went away in the middle: {found.gone}" if found.note and found.gone else ""
        number = found.number + 1
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with _file(folder, number).open("x", encoding="utf-8") as stream:
                stream.write(self.me.model_copy(update={"took_over": lost}).model_dump_json())
        except FileExistsError:  # somebody was quicker
            return False
        with self._lock:
            self._mine[folder] = (number, time.monotonic())
            self._taken_away.discard(folder)
        return True

    def release(self, folder: Path, state: Literal["done", "free", "lost"] = "free", why: str = "") -> None:
        """Say how a job of one's own ended; nothing where it is no more one's own."""
        with self._lock:
            number, _ = self._mine.pop(folder, (-1, 0.0))
        with contextlib.suppress(OSError):  # where it cannot be written, the claim runs out by itself
            if (note := _read(_file(folder, number))) is not None:
                write_json(_file(folder, number), note.model_copy(update={"state": state, "why": why}).model_dump())

    def taken_away(self) -> list[Path]:
        """Give up the jobs that others took over, or may have, as this process could not touch its claims.

        Returns:
            Their folders.
        """
        now = time.monotonic()
        with self._lock:
            late = {folder for folder, (_, touched) in self._mine.items() if now - touched > self.lease}
            found, self._taken_away = self._taken_away | late, set()
            for folder in found:
                self._mine.pop(folder, None)
        return sorted(found)

    def _keep_touching(self) -> None:
        while not self._end.wait(self.beat):
            with self._lock:
                mine = list(self._mine.items())
            for folder, (number, _) in mine:
                self._touch(folder, number)

    def _touch(self, folder: Path, number: int) -> None:
        try:
            os.utime(_file(folder, number))
            kept = not _file(folder, number + 1).exists()
        except FileNotFoundError:
            kept = False
        except OSError:  # a network may be away for a moment
            return
        with self._lock:
            if self._mine.get(folder, (-1,))[0] == number:
                self._mine[folder] = (number, time.monotonic())
                self._taken_away |= set() if kept else {folder}

    # ------------------------------------------------------------------ those of others

    def held_elsewhere(self, folder: Path) -> bool:
        """Whether another process does a job, as far as can be seen."""
        return folder not in self._mine and self._look(folder).held

    def is_alive(self, folder: Path) -> bool:
        """Whether another process was seen to do a job: it runs on this machine, or touched its claim meanwhile."""
        return folder not in self._mine and self._look(folder).alive

    def _look(self, folder: Path) -> _Look:
        number = max(_numbers(folder), default=-1)
        note = _read(_file(folder, number))
        if note is None or note.state != "held":
            return _Look(number, note)
        if note.is_dead():
            return _Look(number, note, gone="it has ended")
        touch = self._watched(folder, number)
        if time.monotonic() - touch.since > self.lease:
            return _Look(number, note, gone=f"it gave no sign for {self.lease:.0f} s")
        return _Look(number, note, alive=touch.moved or note.is_near)

    def _watched(self, folder: Path, number: int) -> _Touch:
        """When the claim of another was seen to change."""
        before, now = self._touches.get(folder), time.monotonic()
        try:
            with _file(folder, number).open("rb") as stream:  # opening asks a file server for news
                changed = os.fstat(stream.fileno()).st_mtime_ns
        except OSError:
            return before or _Touch(number, 0, now, moved=False)
        if before is None or (before.number, before.changed) != (number, changed):
            before = _Touch(number, changed, now, moved=before is not None and before.number == number)
            self._touches[folder] = before
        return before


def losses(folder: Path) -> list[str]:
    """How attempts at a job were lost, since the process or machine that did it went away, from the first."""
    notes = [_read(_file(folder, number)) for number in _numbers(folder)]
    return [why for note in notes if note is not None for why in (note.took_over, note.why) if why]


def forgive(folder: Path) -> None:
    """Forget the lost attempts at a job that nobody does."""
    for number in _numbers(folder):
        _file(folder, number).unlink(missing_ok=True)


def _file(folder: Path, number: int) -> Path:
    return folder / f"claim-{number}"


def _numbers(folder: Path) -> list[int]:
    """Numbers of all claims of a job, rising."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


def _read(file: Path) -> Note | None:
    """What a claim says; of one that is being made, or never was finished, that somebody unknown holds it."""
    try:
        return Note.model_validate_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, ValidationError):
        return Note()


def _system() -> str:
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {psutil.boot_time():.0f}"
