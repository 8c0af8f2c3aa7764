"""Real processes: killed in the middle, continued; and the same over a local Ray cluster."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from adapterlab.compare import CompareConfig, compare, load
from tiny_runs import cli

pytestmark = pytest.mark.slow
STEPS = 160


def wait_for(condition: Callable[[], Any], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes to be killed with their children whatever happens."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        for child in descendants(process.pid):
            child.kill()
        process.kill()
        process.wait()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute as a worker of one thread does: sums in another order have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_kill_in_the_middle_and_start_again(
    fields: dict[str, Any],
    tmp_path: Path,
    started: list[subprocess.Popen[bytes]],
    inline: Callable[..., Any],
    one_thread: None,
) -> None:
    """What was finished is kept, the interrupted training goes on, and the figures are those of a run in one go.

    Those who continue, and who do it in one go, are this process: each process takes as long to start as all steps.
    """
    out = Path(fields["output"])
    plain = {
        **fields, "output": str(out), "methods": [{"lora": {"r": 2}}], "seeds": 1, "budget": {"steps": STEPS},
        "training": {"batch_size": 4, "save_every": 5, "eval_every": 80}, "processes": 1, "threads": 1,
    }  # fmt: skip
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(plain))
    engine = subprocess.Popen([sys.executable, "-m", "adapterlab", "compare", str(file)])
    started.append(engine)
    checkpoint = out / "runs" / "lora" / "seed0" / "train" / "checkpoint" / "state.pt"
    wait_for(checkpoint.is_file)
    kept = (out / "untrained" / "result.json").stat().st_mtime_ns
    workers = descendants(engine.pid)
    assert workers
    os.kill(engine.pid, signal.SIGKILL)
    engine.wait()
    wait_for(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers))
    assert not (out / "runs" / "lora" / "seed0" / "result.json").exists(), "killed too late to show anything"

    pool = inline()
    assert cli("compare", str(file)) == 0
    assert pool.started == [checkpoint.parents[2]]
    (run,) = load(out).runs_of("lora")
    assert (out / "untrained" / "result.json").stat().st_mtime_ns == kept
    assert [step for step, _ in run.train_curve] == list(range(1, STEPS + 1))

    assert cli("compare", str(file), "--output", str(tmp_path / "whole")) == 0
    (other,) = load(tmp_path / "whole").runs_of("lora")
    assert run.best == other.best
    assert run.train_curve == other.train_curve


def test_two_processes_train_a_run_and_one_of_them_is_killed(
    fields: dict[str, Any], tmp_path: Path, inline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates, losses and answers are those of one process with the batches of both, also after a second attempt."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    inline()
    plain = {
        **fields, "output": str(tmp_path / "two"), "methods": [{"lora": {"r": 2}}], "lr": "auto", "threads": 1,
        "search": {"rates": 2, "fractions": [0.05], "extend": 1}, "budget": {"steps": 60}, "processes": 1,
        "training": {"batch_size": 2, "save_every": 2, "eval_every": 30}, "processes_per_run": 2, "parallel": "fsdp",
    }  # fmt: skip
    checkpoint = tmp_path / "two" / "runs" / "lora" / "seed0" / "train" / "checkpoint" / "state.pt"

    def kill_second() -> None:
        wait_for(checkpoint.is_file)
        (second,) = (p for p in descendants(os.getpid()) if p.environ().get("RANK") == "1")
        second.kill()

    killer = threading.Thread(target=kill_second)
    killer.start()
    two = compare(CompareConfig(**plain))
    killer.join()
    (run,) = two.runs_of("lora")
    assert run.attempts == 2
    assert two.conditions["rows in a step"] == 4

    alone = {"processes_per_run": 1, "parallel": "auto", "training": {**plain["training"], "batch_size": 4}}
    one = compare(CompareConfig(**{**plain, **alone, "output": tmp_path / "one"}))
    (other,) = one.runs_of("lora")
    assert run.lr == other.lr
    assert run.tokens == other.tokens
    assert [loss for _, loss in run.train_curve] == pytest.approx([loss for _, loss in other.train_curve], rel=1e-3)
    assert run.best is not None
    assert other.best is not None
    assert run.best.losses == pytest.approx(other.best.losses, rel=1e-3)
    for found, wanted in zip(two.searches[0].rounds[0], one.searches[0].rounds[0], strict=True):
        assert found.loss == pytest.approx(wanted.loss, rel=1e-4)
        assert found.together == 1


def test_a_worker_ends_with_whoever_started_it(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom adapterlab.compare import pools\n"
        "pools.command = lambda folder: [sys.executable, '-c', 'from adapterlab.compare.lifeline import "
        "stop_with_parent as s; s(); import time; time.sleep(100)']\n"
        "p = pools.spawn(Path(sys.argv[1]), 1)\nprint(p.pid, flush=True)\ntime.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 60)


def test_a_process_that_says_nothing_is_reported(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterlab.compare import pools

    monkeypatch.setattr(pools, "can_fork", lambda: False)
    monkeypatch.setattr(pools, "command", lambda folder: [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    result = compare(CompareConfig(**fields))
    (run,) = result.runs_of("lora", "failed")
    assert result.runs_of("untrained", "failed")[0].attempts == 2
    assert "signal 9" in run.reason


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_two_ray_workers(fields: dict[str, Any]) -> None:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        config = CompareConfig(**{**fields, "methods": [{"lora": {"r": 2}}, "ia3"], "threads": 1})
        result = compare(config, engine="ray")
    finally:
        ray.shutdown()
    assert result.conditions["runs at a time"] == 2
    assert result.conditions["engine"] == "ray"
    assert [run.status for run in result.runs] == ["finished"] * 3
    assert all(run.best is not None for run in result.runs)
