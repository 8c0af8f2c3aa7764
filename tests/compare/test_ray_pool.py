"""The pool of a Ray cluster, with a cluster that only pretends: what fits where, who may work, and what is lost."""

from __future__ import annotations

import importlib.machinery
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterlab.compare import ray_pool
from adapterlab.compare.config import CompareConfig
from adapterlab.compare.ray_pool import RayPool
from adapterlab.compare.software import Software
from adapterlab.errors import ConfigError, MissingDependencyError, TrainingError

BIG, SMALL, HEAD = {"CPU": 8.0, "GPU": 4.0, "memory": 64e9}, {"CPU": 8.0, "GPU": 2.0, "memory": 16e9}, {"CPU": 1.0}


class RayError(Exception):
    """Base of Ray's errors."""


class Remote:
    """A function that a cluster could call."""

    def __init__(self, cluster: Cluster, function: Callable[..., Any], needs: dict[str, Any]):
        self.cluster, self.function, self.needs = cluster, function, needs

    def options(self, **options: Any) -> Remote:
        return self

    def remote(self, *arguments: Any) -> str:
        if self.function is ray_pool._do:
            self.cluster.asked.append({name: need for name, need in self.needs.items() if name != "max_retries"})
            return f"task {len(self.cluster.asked)}"
        return self.function(*arguments)  # a question, answered at once


class Cluster:
    """What the pool calls of Ray."""

    def __init__(self, *machines: dict[str, float]):
        self.machines, self.asked, self.ended = machines, list[dict[str, Any]](), dict[str, Any]()
        self.head = ""

    def nodes(self) -> list[dict[str, Any]]:
        names = ("NodeID", "NodeManagerHostname", "NodeManagerAddress")
        return [{**dict.fromkeys(names, f"m{i}"), "Alive": True, "Resources": m} for i, m in enumerate(self.machines)]

    def remote(self, **needs: Any) -> Callable[[Callable[..., Any]], Remote]:
        return lambda function: Remote(self, function, needs)

    def get(self, task: str, timeout: float = 0.0) -> Any:
        found = self.ended.get(task, task)
        if isinstance(found, Exception):
            raise found
        return found

    def wait(self, tasks: list[str], **options: Any) -> tuple[list[str], list[str]]:
        return [task for task in tasks if task in self.ended], [task for task in tasks if task not in self.ended]

    def get_runtime_context(self) -> Any:
        return types.SimpleNamespace(gcs_address=self.head)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> Callable[..., tuple[RayPool, Cluster]]:
    """`pool(machine, ..., gpus=2)`: the pool on a cluster of these machines."""

    def make(*machines: dict[str, float], **settings: Any) -> tuple[RayPool, Cluster]:
        cluster = Cluster(*machines)
        for name in ("ray", "ray.util", "ray.util.scheduling_strategies"):
            module: Any = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        module.NodeAffinitySchedulingStrategy = lambda number, soft: number
        ray: Any = sys.modules["ray"]
        for name in ("nodes", "remote", "get", "wait", "get_runtime_context"):
            setattr(ray, name, getattr(cluster, name))
        ray.is_initialized = lambda: True
        ray.exceptions = types.SimpleNamespace(RayError=RayError, RaySystemError=type("Gone", (RayError,), {}))
        config = CompareConfig(**{**fields, "device": None, **settings})
        config.output.mkdir(exist_ok=True)
        return RayPool(config), cluster

    return make


@pytest.mark.parametrize(
    ("settings", "size", "needs"),
    [
        ({}, 6, {"num_cpus": 2, "num_gpus": 1}),  # a GPU each, and its share of the cores
        ({"gpus": 2, "threads": 1}, 3, {"num_cpus": 1, "num_gpus": 2}),
        ({"gpus": 4}, 1, {"num_cpus": 8, "num_gpus": 4}),
        ({"device": "cpu", "threads": 4}, 4, {"num_cpus": 4, "num_gpus": 0}),
        ({"device": "cpu", "threads": 4, "processes": 3}, 3, {"num_cpus": 4, "num_gpus": 0}),
        ({"processes_per_run": 2}, 3, {"num_cpus": 4, "num_gpus": 2}),
        ({"processes_per_run": 2, "device": "cpu", "threads": 2}, 4, {"num_cpus": 4, "num_gpus": 0}),
        ({"gpus": 1, "threads": 1, "memory": "10GB"}, 5, {"num_cpus": 1, "num_gpus": 1, "memory": 10 * 2**30}),
    ],
)
def test_as_many_at_a_time_as_single_machines_have_room_for(
    pool: Callable[..., tuple[RayPool, Cluster]], tmp_path: Path, settings: dict[str, Any], size: int, needs: Any
) -> None:
    made, cluster = pool(BIG, SMALL, HEAD, **settings)
    assert made.size == size
    for number in range(size):
        assert made.has_room()
        made.start(tmp_path / str(number))
    assert not made.has_room()
    assert cluster.asked == [needs] * size


@pytest.mark.parametrize("settings", [{"gpus": 5}, {"threads": 16}, {"memory": "1TB"}, {"gpus": 4, "memory": "60GB"}])
def test_what_no_machine_has_is_refused_at_once(
    pool: Callable[..., tuple[RayPool, Cluster]], settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"no machine of the Ray cluster has that: there are 8 CPUs, 4 GPUs"):
        pool({**BIG, "memory": 50e9}, SMALL, **settings)


def test_all_machines_need_the_same_software_and_the_folder(
    pool: Callable[..., tuple[RayPool, Cluster]], monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    fault = ray_pool._fault(str(fields["output"] / "nowhere"), Software.here().model_dump())
    assert "cannot write" in fault
    here = Software.here()
    other = here.model_copy(update={"versions": {**here.versions, "torch": "1.0"}})
    assert ray_pool._fault(str(fields["output"].parent), here.model_dump()) == ""
    monkeypatch.setattr(ray_pool, "Software", types.SimpleNamespace(here=lambda: other))
    monkeypatch.setattr(ray_pool, "_fault", lambda root, software: Software(**software).check("It") or "")
    with pytest.raises(ConfigError, match=r"torch: 1.0 there"):
        pool(SMALL)


def test_a_lost_task_is_no_failure_and_a_machine_that_joined_with_other_software_ends_all(
    pool: Callable[..., tuple[RayPool, Cluster]], tmp_path: Path
) -> None:
    made, cluster = pool(SMALL)
    for name in "ab":
        made.start(tmp_path / name)
    cluster.ended["task 1"] = RayError("The worker died. Look into many files.\nMore of it.")
    cluster.ended["task 2"] = 0
    assert made.finished() == [(tmp_path / "a", "Ray lost its task (RayError: The worker died)"), (tmp_path / "b", 0)]
    made.start(tmp_path / "c")
    cluster.ended["task 3"] = ConfigError("other software")
    with pytest.raises(ConfigError, match="other software"):
        made.finished()


def test_a_head_that_went_away_is_waited_for_and_then_named(
    pool: Callable[..., tuple[RayPool, Cluster]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(ray_pool, "time", types.SimpleNamespace(monotonic=lambda: now))
    made, cluster = pool(SMALL)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        cluster.head = f"127.0.0.1:{server.getsockname()[1]}"  # nobody listens there
        now += 20
        cluster.machines = ()
        assert made.size == 2, "it may come back"
        server.listen()
        now += 30
        assert made.size == 0
    now += 60
    with pytest.raises(TrainingError, match=r"went away.*same command"):
        _ = made.size


def test_an_address_where_nobody_answers(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    ray: Any = types.ModuleType("ray")
    ray.__spec__, ray.is_initialized = importlib.machinery.ModuleSpec("ray", None), lambda: False
    monkeypatch.setitem(sys.modules, "ray", ray)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ConfigError, match=r"no Ray cluster at RAY_ADDRESS=127.*ray start"):
            RayPool(CompareConfig(**fields))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"adapterlab\[ray\]"):
        RayPool(CompareConfig(**fields))
