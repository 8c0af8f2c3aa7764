"""A prepared process that splits itself for each job: what jobs see of it, and what becomes of them without it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from adapterlab.compare import forking, ray_pool
from adapterlab.compare.forking import Forked, Forks
from adapterlab.compare.software import Software

if sys.platform != "linux":
    pytest.skip("only Linux has it", allow_module_level=True)

JOB = """
import os, sys, time
import torch
if __name__ != "__main__":
    print("no answer")
IMPORTED_BY = os.getpid()

def main(argument):
    print(argument, IMPORTED_BY, os.getpid(), os.getsid(0), os.environ["OMP_NUM_THREADS"], os.getcwd(), flush=True)
    if argument == "raise":
        raise RuntimeError("broken")
    if argument == "sleep":
        time.sleep(100)
    return int(argument)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "job_of_test.py").write_text(JOB)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return tmp_path


@pytest.fixture
def forks(place: Path) -> Iterator[Forks]:
    made = Forks("job_of_test", 3, ())
    yield made
    made.close()


def said(job: Forked, log: Path) -> list[str]:
    """What a job that has begun said."""
    for _ in range(600):
        if log.is_file() and (words := log.read_text().split()):
            return words
        job.poll()
        time.sleep(0.1)
    raise AssertionError("the job never began")


def gone(pid: int) -> bool:
    for _ in range(600):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_jobs_begin_in_a_prepared_process_and_end_as_others_do(forks: Forks, place: Path) -> None:
    logs = {argument: place / "logs" / f"{argument}.txt" for argument in ("0", "3", "raise", "sleep")}
    jobs = {argument: forks.start(argument, log) for argument, log in logs.items()}
    assert [jobs[argument].wait(60) for argument in ("0", "3", "raise")] == [0, 3, 1]
    with pytest.raises(subprocess.TimeoutExpired):
        jobs["sleep"].wait(0.1)
    assert jobs["sleep"].poll() is None
    words = {argument: said(jobs[argument], log) for argument, log in logs.items()}
    for argument, (first, parent, own, session, threads, cwd, *_) in words.items():
        assert (first, parent, cwd) == (argument, str(forks._process.pid), str(Path.cwd()))
        assert (own, session, threads) == (str(jobs[argument].pid), own, "3")
    assert len({own for _, _, own, *_ in words.values()}) == len(logs)
    assert "RuntimeError: broken" in logs["raise"].read_text()
    prepared, forked = (psutil.Process(pid).memory_info() for pid in (forks._process.pid, jobs["sleep"].pid))
    assert forked.shared == pytest.approx(prepared.shared, rel=0.05), "libraries count for it as for one of its own"
    assert forked.shared > 50 << 20
    jobs["sleep"].terminate()
    assert jobs["sleep"].wait(60) == -15
    again = forks.start("sleep", place / "again.txt")
    said(again, place / "again.txt")
    again.kill()
    assert again.wait(60) == -9
    jobs["0"].kill()  # of a job that has ended its number may be another's by now
    assert jobs["0"].poll() == 0


def test_jobs_end_with_the_process_that_prepared_them(forks: Forks, place: Path) -> None:
    job = forks.start("sleep", place / "log.txt")
    said(job, place / "log.txt")
    pid: Any = job.pid
    forks._process.kill()
    assert gone(pid)
    assert job.wait(60) == -9
    later = forks.start("3", place / "later.txt")
    assert later.wait(60) == 3, "it is started by itself"


def test_jobs_end_with_whoever_asked_for_them(place: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom adapterlab.compare.forking import Forks\n"
        "forks = Forks('job_of_test', 1, ())\njob = forks.start('sleep', Path(sys.argv[1]))\n"
        "while job.pid is None: time.sleep(0.1)\nprint(job.pid, flush=True)\ntime.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(place / "log.txt")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert gone(pid)


@pytest.mark.parametrize(
    "line",
    [
        "import threading\nthreading.Thread(target=time.sleep, args=(100,), daemon=True).start()",
        "import nothing_of_this_name",
    ],
)
def test_where_nothing_can_be_forked_jobs_are_started_by_themselves(line: str, place: Path) -> None:
    (place / "job_of_test.py").write_text(JOB.replace("IMPORTED_BY", f"{line}\nIMPORTED_BY", 1))
    forks = Forks("job_of_test", 2, ())
    try:
        first, second = (forks.start(argument, place / f"{argument}.txt") for argument in ("3", "sleep"))
        if "nothing" in line:
            assert first.wait(60) == 1
            assert "No module named 'nothing_of_this_name'" in (place / "3.txt").read_text()
            return
        assert first.wait(60) == 3
        _, imported, own, *_ = said(second, place / "sleep.txt")
        assert imported == own == str(second.pid)
        second.terminate()
        assert second.wait(60) == -15
    finally:
        for job in (first, second):
            job.kill()
            job.wait(60)
        forks.close()


def test_tasks_of_one_ray_worker_are_forked_from_one_process(place: Path) -> None:
    here, elsewhere = Software.here().model_dump(), place / "elsewhere"
    elsewhere.mkdir()
    ray_pool._prepared.cache_clear()
    logs = [place / f"{name}.txt" for name in ("first", "second", "by_itself")]
    try:
        for log, forks in zip(logs, (True, True, False), strict=True):
            assert ray_pool._do(["-m", "job_of_test", "3"], str(log), 3, str(elsewhere), here, forks) == 3
    finally:
        ray_pool._prepared("job_of_test", 3).close()
        ray_pool._prepared.cache_clear()
    (first, second, alone) = (log.read_text().split() for log in logs)
    assert first[1] == second[1] != alone[1]
    assert (first[1] == first[2], alone[1] == alone[2]) == (False, True)
    assert {tuple(words[4:6]) for words in (first, second, alone)} == {("3", str(elsewhere))}


def test_only_where_it_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterlab.foreign import processor

    monkeypatch.setattr(processor, "accelerated", lambda: True)
    assert not forking.can_fork()
    monkeypatch.setattr(processor, "accelerated", lambda: False)
    assert forking.can_fork()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not forking.can_fork()
