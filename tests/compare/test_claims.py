"""Who does which job where nothing but a folder is shared: one at a time, the next after those who are gone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from adapterlab.compare import claims
from adapterlab.compare.claims import Claims, Note, losses
from adapterlab.errors import OutputError

Make = Callable[..., Claims]


@pytest.fixture
def make() -> Iterator[Make]:
    """Claims of as many processes as are asked for."""
    made: list[Claims] = []

    def one(beat: float = 60.0, lease: float = 60.0) -> Claims:
        made.append(Claims(beat, lease))
        return made[-1]

    yield one
    for each in made:
        each.close()


def claimed_elsewhere(folder: Path, number: int = 0, text: str | None = None) -> Path:
    """Claim a job for a process of another machine."""
    folder.mkdir(exist_ok=True)
    note = Note(host="far", system="another start of another machine", process=7, started=1.0)
    file = folder / f"claim-{number}"
    file.write_text(note.model_dump_json() if text is None else text)
    return file


def test_of_many_at_once_one_has_it(tmp_path: Path, make: Make) -> None:
    workers = [make() for _ in range(12)]
    gate, won = threading.Barrier(len(workers)), []

    def ask(worker: Claims) -> None:
        gate.wait()
        if worker.take([tmp_path / "job"]):
            won.append(worker)

    threads = [threading.Thread(target=ask, args=[worker]) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = won
    assert all(other.held_elsewhere(tmp_path / "job") for other in workers if other is not winner)
    winner.release(tmp_path / "job")
    assert workers[0].take([tmp_path / "job"])
    assert losses(tmp_path / "job") == []


def test_all_or_none(tmp_path: Path, make: Make) -> None:
    one, other, folders = make(), make(), [tmp_path / name for name in "abc"]
    assert one.take(folders[2:])
    assert not other.take(folders)
    assert one.take(folders[:2])


def test_one_without_a_sign_is_followed_after_the_lease_and_one_with_signs_is_not(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(claims, "time", SimpleNamespace(monotonic=lambda: now))
    silent, busy = tmp_path / "silent", tmp_path / "busy"
    claimed_elsewhere(silent)
    file, worker = claimed_elsewhere(busy), make(lease=30)
    for number in range(5):
        os.utime(file, ns=(number, number))  # of a clock that is wrong, and goes slow
        assert not worker.take([busy])
        assert worker.is_alive(busy) == (number > 0)
        assert worker.take([silent]) == (number == 4), "the lease begins when the claim is first seen"
        now += 10
    assert losses(silent) == ["process 7 on far went away in the middle: it gave no sign for 30 s"]
    assert losses(busy) == []


@pytest.mark.parametrize("text", ["", '{"host": '])
def test_a_claim_that_was_never_finished_runs_out_too(tmp_path: Path, make: Make, text: str) -> None:
    claimed_elsewhere(tmp_path, text=text)
    worker = make(lease=0.05)
    assert not worker.take([tmp_path])
    time.sleep(0.1)
    assert worker.take([tmp_path])


def test_one_that_ended_on_this_machine_is_followed_at_once(tmp_path: Path, make: Make) -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(process.pid).create_time()
    note = Note.mine().model_copy(update={"process": process.pid, "started": started})
    (tmp_path / "claim-0").write_text(note.model_dump_json())
    worker = make()
    assert worker.is_alive(tmp_path)
    assert not worker.take([tmp_path])
    process.communicate()
    assert worker.take([tmp_path])
    assert "has ended" in losses(tmp_path)[0]

    (tmp_path / "other").mkdir()
    given_again = Note.mine().model_copy(update={"started": started - 1000})  # another process had the number
    (tmp_path / "other" / "claim-0").write_text(given_again.model_dump_json())
    assert worker.take([tmp_path / "other"])


def test_who_was_only_held_up_lets_go(tmp_path: Path, make: Make) -> None:
    held = make(beat=0.02)
    jobs = [tmp_path / name for name in ("taken over", "removed", "kept")]
    assert held.take(jobs)
    claimed_elsewhere(jobs[0], 1)
    (jobs[1] / "claim-0").unlink()
    found: set[Path] = set()
    end = time.monotonic() + 20
    while len(found) < 2 and time.monotonic() < end:
        found |= set(held.taken_away())
    assert found == set(jobs[:2])
    held.release(jobs[0])
    assert make().held_elsewhere(jobs[0]), "the claim of the next one stays as it is"


def test_who_cannot_touch_claims_takes_them_for_lost(tmp_path: Path, make: Make) -> None:
    held = make(lease=0.05)
    assert held.take([tmp_path])
    time.sleep(0.1)
    assert held.taken_away() == [tmp_path]


def test_a_folder_that_cannot_be_written(tmp_path: Path, make: Make) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written.*permissions"):
        make().take([tmp_path / "file" / "job"])


def test_lost_attempts_can_be_forgiven(tmp_path: Path, make: Make) -> None:
    worker = make()
    assert worker.take([tmp_path])
    worker.release(tmp_path, "lost", "the machine burnt")
    assert worker.take([tmp_path])
    worker.release(tmp_path, "done")
    assert losses(tmp_path) == ["the machine burnt"]
    claims.forgive(tmp_path)
    assert losses(tmp_path) == []
