"""Several processes on one comparison: what is done by whom, what is left to others, and who may not help."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inline_comparisons import InlinePool
from test_scheduling import pretend, started

from adapterlab.compare import CompareConfig, compare, engine, load, work
from adapterlab.compare.claims import Claims, Note
from adapterlab.compare.jobs import Job
from adapterlab.errors import ConfigError, DataError, OutputError
from tiny_runs import cli

SECOND = "runs/lora/seed1"


@pytest.fixture
def config(fields: dict[str, Any]) -> CompareConfig:
    return CompareConfig(**{**fields, "methods": ["lora", "ia3"], "lr": "auto", "seeds": 2, "processes": 2})


@pytest.fixture
def helping(inline: Callable[..., InlinePool], config: CompareConfig) -> Callable[..., InlinePool]:
    """Open the comparison for others, and let jobs be done by a function in this process."""

    def opened(does: Callable[[Path], int] = pretend) -> InlinePool:
        assert not compare(config, engine="folder").finished
        return inline(does)

    return opened


def far(folder: Path, number: int = 0, **fields: Any) -> Path:
    """A claim of another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"claim-{number}"
    file.write_text(Note(host="far", system="another", process=7, **fields).model_dump_json())
    return file


def test_who_helps_does_all_that_a_comparison_of_its_own_would(
    helping: Callable[..., InlinePool], config: CompareConfig
) -> None:
    pool = helping()
    said: list[str] = []
    result = work(config.output, processes=1, say=said.append)
    assert result is not None
    assert result.finished
    assert said[:2] == ["started: untrained model", "finished: untrained model"]
    assert {run.status for run in result.runs} == {"finished"}
    assert load(config.output) == result
    assert result.conditions["engine"] == "folder"
    assert result.conditions["runs at a time"] == 2, "of all who help together"
    order = started(pool, config.output)

    pool.started.clear()
    alone = compare(config.model_copy(update={"output": config.output.with_name("alone")}))
    assert started(pool, config.output.with_name("alone")) == order
    assert [(run.label, run.seed, run.best) for run in alone.runs] == [
        (run.label, run.seed, run.best) for run in result.runs
    ]
    assert alone.standings == result.standings
    assert work(config.output, say=said.append) == load(config.output), "there is nothing left to do"


def test_what_others_do_is_left_to_them(helping: Callable[..., InlinePool], config: CompareConfig) -> None:
    pool, other = helping(), Claims()
    try:
        assert other.take([config.output / SECOND])
        assert work(config.output, say=lambda line: None) is None
        assert SECOND not in started(pool, config.output)
        shown = compare(config, engine="folder")
        assert not shown.finished
        assert [run.status for run in shown.runs if run.status != "finished"] == ["running"]
    finally:
        other.close()
    assert work(config.output, say=lambda line: None) is not None
    assert started(pool, config.output)[-1] == SECOND


def test_a_run_that_was_lost_too_often_is_given_up_with_the_reason_until_it_is_forgiven(
    helping: Callable[..., InlinePool], config: CompareConfig
) -> None:
    pool = helping()
    for number in range(config.restarts):
        far(config.output / SECOND, number, state="lost", why=f"machine {number} burnt")
    result = work(config.output, say=lambda line: None)
    assert result is not None
    (run,) = [run for run in result.runs_of("lora") if run.seed == 1]
    assert run.status == "finished"
    assert run.lost[-1] == "machine 4 burnt"
    assert run.together == 1, "one that was lost again and again trains by itself"

    far(config.output / SECOND, config.restarts + 1, state="lost", why="all burnt")
    (config.output / SECOND / "result.json").unlink()
    result = work(config.output, say=lambda line: None)
    assert result is not None
    (failed,) = result.runs_of("lora", "failed")
    assert "went away 6 times" in failed.reason
    assert "all burnt" in failed.reason
    count = len(pool.started)
    assert compare(config, retry=True).finished
    assert len(pool.started) == count + 1


def test_a_process_that_is_asked_to_end_has_not_failed(
    helping: Callable[..., InlinePool], config: CompareConfig
) -> None:
    pool: InlinePool

    def end_once(folder: Path) -> int:
        first = pool.started.count(folder) == 1
        return -signal.SIGTERM if first and folder.name == "seed0" else pretend(folder)

    pool = helping(end_once)
    result = work(config.output, say=lambda line: None)
    assert result is not None
    runs = [run for run in result.runs if not run.is_untrained]
    assert [run.attempts for run in runs] == [0] * 4
    assert [len(run.lost) for run in runs] == [1, 0, 1, 0]


def test_a_job_that_others_took_over_is_ended(
    helping: Callable[..., InlinePool], config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = helping()
    ended: list[Path] = []

    def start(folder: Path) -> None:
        pool.started.append(folder)
        if folder.parent.name == "lr" and not ended:
            far(folder, 1)  # another machine thinks that this one is gone
        else:
            pool.done.append((folder, pretend(folder)))

    def cancel(folder: Path) -> None:
        ended.append(folder)
        (folder / "claim-1").write_text(Note(state="free").model_dump_json())

    monkeypatch.setattr(engine, "Claims", functools.partial(Claims, beat=0.02))
    monkeypatch.setattr(engine, "_LOOK", 0.0)
    monkeypatch.setattr(pool, "start", start)
    monkeypatch.setattr(pool, "cancel", cancel, raising=False)
    monkeypatch.setattr(pool, "has_room", lambda: not pool.done and (len(pool.started) != 2 or bool(ended)))
    assert work(config.output, say=lambda line: None) is not None
    assert ended == [config.output / "lr/lora"]


def test_who_may_not_help(
    helping: Callable[..., InlinePool], config: CompareConfig, tmp_path: Path, fields: dict[str, Any]
) -> None:
    with pytest.raises(OutputError, match=r"holds no comparison.*--engine folder"):
        work(tmp_path)
    pool = helping()
    file = config.output / "opened.json"
    good = json.loads(file.read_text())
    old = {**good["software"], "versions": {**good["software"]["versions"], "torch": "1.0"}}
    for software, why in (
        (old, "torch: 1.0 there"),
        ({**good["software"], "sources": "0" * 64}, "sources of adapterlab"),
    ):
        file.write_text(json.dumps({**good, "software": software}))
        with pytest.raises(ConfigError, match=why):
            work(config.output)
    file.write_text(json.dumps({**good, "digest": "0" * 64}))
    pool.work = lambda folder: (file.write_text(json.dumps(good)), pretend(folder))[1]
    with pytest.raises(ConfigError, match="another comparison by now"):
        work(config.output)
    rows = Path(fields["data"]["path"])
    rows.write_text("\n".join(rows.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match="not those that the comparison"):
        work(config.output)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 130)])
def test_asked_to_end_a_worker_leaves_its_job_to_others(
    helping: Callable[..., InlinePool], config: CompareConfig, number: signal.Signals, status: int
) -> None:
    def work_until_asked(folder: Path) -> int:
        if folder.name == "untrained":
            return pretend(folder)
        os.kill(os.getpid(), number)
        return 0

    pool = helping(work_until_asked)
    before = signal.getsignal(number)
    assert cli("compare", str(config.output), "--worker") == status
    assert signal.getsignal(number) is before
    other = Claims()
    assert not other.held_elsewhere(pool.started[-1])
    other.close()
    pool.work, pool.done = pretend, []
    assert cli("compare", str(config.output), "--worker", "--quiet") == 0
    assert (config.output / "report.html").is_file(), "who does the last job writes the report"


def test_a_worker_takes_no_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli("compare", str(tmp_path), "seeds=3", "--worker", "--engine", "ray") == 2
    assert "seeds=3, --engine" in capsys.readouterr().err


def test_jobs_know_nothing_of_the_folder_that_they_were_opened_in(
    helping: Callable[..., InlinePool], config: CompareConfig
) -> None:
    """Machines may see the folder under other paths."""
    pool = helping()
    moved = config.output.rename(config.output.with_name("mounted elsewhere"))
    assert work(moved, say=lambda line: None) is not None
    assert all(folder.is_relative_to(moved) for folder in pool.started)
    job = Job(**json.loads((moved / "runs/lora/seed0/job.json").read_text()))
    assert job.settings().output == moved
