"""A real Ray cluster on this machine: jobs with several GPUs, a worker that is killed, a head that goes away."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from test_processes import descendants, wait_for

from adapterlab.compare import CompareConfig, compare, load, pools

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]
STEPS = 160
# A job that writes down which GPUs it may see, and when.
SEES = """
import json, os, pathlib, sys, time
from adapterlab.compare.worker import main
begun, status = time.time(), main(sys.argv[1])
seen = [os.environ.get("CUDA_VISIBLE_DEVICES"), begun, time.time()]
(pathlib.Path(sys.argv[1]) / "seen.json").write_text(json.dumps(seen))
sys.exit(status)
"""


@pytest.fixture
def cluster() -> Iterator[Callable[..., Any]]:
    """`cluster(num_cpus=2)`: a cluster of this process."""
    import ray

    yield lambda **has: ray.init(include_dashboard=False, log_to_driver=False, **has)
    ray.shutdown()


def test_each_job_has_its_gpus_for_itself(
    cluster: Callable[..., Any], fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four GPUs that the cluster only believes in, and two for each job."""
    cluster(num_cpus=4, num_gpus=4)
    monkeypatch.setattr(pools, "command", lambda folder: [sys.executable, "-c", SEES, str(folder)])
    methods = [{"lora": {"r": 2, "alpha": [1, 2, 3]}}]
    config = CompareConfig(**{**fields, "methods": methods, "seeds": 1, "threads": 1, "gpus": 2, "device": "cpu"})
    result = compare(config, engine="ray")
    assert [run.status for run in result.runs] == ["finished"] * len(result.runs)
    assert result.conditions["runs at a time"] == 2
    seen = [json.loads(file.read_text()) for file in config.output.rglob("seen.json")]
    assert len(seen) == len(result.runs)
    assert all(len(gpus.split(",")) == 2 for gpus, _, _ in seen)
    for gpus, begun, ended in seen:
        beside = [other for other in seen if other[1] < ended and begun < other[2] and other[1:] != [begun, ended]]
        assert all(not {*gpus.split(",")} & {*other.split(",")} for other, _, _ in beside)


def test_a_worker_that_is_killed_loses_nothing_but_its_last_steps(
    cluster: Callable[..., Any], fields: dict[str, Any]
) -> None:
    cluster(num_cpus=2)
    training = {"batch_size": 4, "save_every": 5, "eval_every": 80}
    changed = {"methods": [{"lora": {"r": 2}}], "seeds": 1, "budget": {"steps": STEPS}, "training": training}
    config = CompareConfig(**{**fields, **changed, "threads": 1})
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(compare(config, engine="ray")))
    thread.start()
    saved = config.output / "runs" / "lora" / "seed0" / "train" / "metrics.jsonl"
    wait_for(lambda: saved.is_file() and len(saved.read_text().splitlines()) > 8)
    os.kill(_ray_workers()[0], signal.SIGKILL)
    thread.join(200)
    (result,) = found
    (run,) = result.runs_of("lora")
    assert run.steps == STEPS
    assert len(run.lost) == 1
    steps = [json.loads(line).get("step") for line in saved.read_text().splitlines()]
    assert steps[-1] == STEPS


def _ray_workers() -> list[int]:
    """The workers of Ray's whose jobs are running: each started a prepared process, of which jobs are forked."""
    prepared = [
        p for p in psutil.process_iter(["cmdline"]) if "adapterlab.compare.forking" in (p.info["cmdline"] or ())
    ]
    return [process.ppid() for process in prepared if process.children() and _is_rays(process.parent())]


def _is_rays(process: psutil.Process | None) -> bool:
    return process is not None and process.name().startswith("ray::")


def test_the_same_command_continues_when_the_head_is_back(fields: dict[str, Any], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
    start = [*ray, "start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    plain = {
        **fields, "output": str(fields["output"]), "methods": [{"lora": {"r": 2}}], "seeds": 1, "threads": 1,
        "budget": {"steps": STEPS}, "training": {"batch_size": 4, "save_every": 5, "eval_every": 80},
    }  # fmt: skip
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(plain))
    command = [sys.executable, "-m", "adapterlab", "compare", str(file), "--engine", "ray"]
    environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    saved = Path(plain["output"]) / "runs" / "lora" / "seed0" / "train" / "metrics.jsonl"
    driver = None
    try:
        subprocess.run(start, check=True, capture_output=True, timeout=120)
        driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for(lambda: saved.is_file() and len(saved.read_text().splitlines()) > 8)
        subprocess.run([*ray, "stop", "--force"], check=True, capture_output=True, timeout=120)
        said, _ = driver.communicate(timeout=200)
        assert driver.returncode != 0
        assert "The Ray cluster went away" in said
        subprocess.run(start, check=True, capture_output=True, timeout=120)
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert again.returncode == 0, again.stdout + again.stderr
    finally:
        subprocess.run([*ray, "stop", "--force"], check=False, capture_output=True, timeout=120)
        if driver is not None:
            for child in descendants(driver.pid):
                child.kill()
            driver.kill()
    result = load(Path(plain["output"]))
    assert [run.status for run in result.runs] == ["finished"] * 2
