"""Tasks of a Ray cluster, whose machines see the comparison's folder under the same path.

A task asks for what a run needs, and Ray finds a machine that has it all. The task starts the job's process and waits:
the process is as good as one of the local pool, and ends with the task. Ray gives one task after the other to the same
worker, which keeps a process that has imported what jobs need and forks it for each. Ray's workers import this module,
so nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab.compare import lifeline
from adapterlab.compare.forking import Forked, Forks
from adapterlab.compare.software import Software
from adapterlab.errors import ConfigError, TrainingError, require

if TYPE_CHECKING:
    from adapterlab.compare.config import CompareConfig
    from adapterlab.compare.pools import Ending

_LOOK = 10.0  # seconds between looks at which machines there are
_STOP_SECONDS = 60.0  # for jobs to save what they have
_POLL = 0.2
_REACH = 10.0  # seconds within which an address has to answer
_ANSWER = 180.0  # seconds within which each machine has to say what it is; it imports the package first
_PATIENCE = 40.0  # seconds that the head may be away; after a minute, Ray ends this process without a word
_WORDS = 200  # characters of a message of Ray's
_MOST_THREADS = 4  # of a run without a GPU


class RayPool:
    """Tasks of a Ray cluster.

    Attributes:
        processes: that train in each job.
        threads: CPUs of each of them.
        gpus: GPUs of each job.

    Args:
        config: of the comparison, whose folder exists.

    Raises:
        MissingDependencyError: Ray is not installed.
        ConfigError: no cluster answers; no machine of it has what a run needs; or one has other software, or does not
            see the folder.
    """

    def __init__(self, config: CompareConfig):
        require("ray", "ray", "for --engine ray")
        import ray

        self._ray: Any = ray
        self.processes = config.processes_per_run
        self._root, self._most, self._memory = config.output.absolute(), config.processes, config.memory_bytes()
        self._software = Software.here().model_dump()
        self.running: dict[Any, Path] = {}
        _connect(ray, config)
        machines = self._machines()
        gpus = any(machine.get("GPU") for machine in machines.values())
        self.gpus = (
            config.gpus
            if config.gpus is not None
            else self.processes * (gpus and (config.device or "cuda").startswith("cuda"))
        )
        self.threads = config.threads or self._threads(machines)
        self._size = sum(map(self._places, machines.values()))
        self._looked = self._answered = time.monotonic()
        self._check_room(machines)
        self._check_machines(machines)

    @property
    def size(self) -> int:
        """Jobs at a time, as the cluster is now."""
        if time.monotonic() - self._looked >= _LOOK and self._head_answers():
            self._size, self._looked = sum(map(self._places, self._machines().values())), time.monotonic()
        return min(self._most or self._size, self._size)

    def start(self, folder: Path) -> None:
        """Start the job of a folder."""
        from adapterlab.compare.jobs import LOG
        from adapterlab.compare.pools import command

        place = folder.absolute()
        task = self._ray.remote(**self._needs(), max_retries=0)(_do)
        forks = not self.gpus  # a process with a GPU must not be split
        made = task.remote(command(place)[1:], str(place / LOG), self.threads, str(Path.cwd()), self._software, forks)
        self.running[made] = folder

    def finished(self) -> list[tuple[Path, Ending]]:
        """Return the folders of the jobs that have ended since the last call, and how."""
        if not self.running:
            return []
        with self._reachable():
            ended, _ = self._ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        return [(self.running.pop(task), self._ending(task)) for task in ended]

    def has_room(self) -> bool:
        """Whether another job may start."""
        return len(self.running) < self.size

    def cancel(self, folder: Path) -> None:
        """End the job of a folder at once: Ray kills the worker with all it started."""
        task = next(task for task, other in self.running.items() if other == folder)
        self._ray.cancel(task, force=True)
        del self.running[task]

    def stop(self) -> None:
        """Ask the running jobs to save what they have, and wait for them."""
        tasks = list(self.running)
        with contextlib.suppress(self._ray.exceptions.RayError, ConnectionError):
            for task in tasks:
                self._ray.cancel(task)
            late = self._ray.wait(tasks, num_returns=len(tasks), timeout=_STOP_SECONDS)[1] if tasks else []
            for task in late:
                self._ray.cancel(task, force=True)
        self.running.clear()

    def _ending(self, task: Any) -> Ending:
        try:
            return int(self._ray.get(task))
        except ConfigError:  # of a machine that has joined since
            raise
        except self._ray.exceptions.RayError as error:  # the machine or its worker died
            return f"Ray lost its task ({type(error).__name__}: {_first_line(error)})"

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except (self._ray.exceptions.RaySystemError, ConnectionError) as error:
            raise _went_away(error) from None

    def _head_answers(self) -> bool:
        """Whether the head is there; without it, whatever is asked of Ray waits, and then ends this process."""
        try:
            _check_answers(self._ray.get_runtime_context().gcs_address)
        except OSError as error:
            if time.monotonic() - self._answered > _PATIENCE:
                raise _went_away(error) from None
            return False
        self._answered = time.monotonic()
        return True

    # ------------------------------------------------------------------ the cluster

    def _machines(self) -> dict[str, Mapping[str, float]]:
        """What each machine that is up has, by its number in the cluster."""
        with self._reachable():
            return {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}

    def _threads(self, machines: Mapping[str, Mapping[str, float]]) -> int:
        """Its share of the cores of the smallest machine that runs can be on."""
        if self.gpus:
            shares = [
                m.get("CPU", 1) * self.gpus // m["GPU"] for m in machines.values() if m.get("GPU", 0) >= self.gpus
            ]
            return max(1, int(min(shares, default=1)) // self.processes)
        cores = int(min((m["CPU"] for m in machines.values() if m.get("CPU", 0) >= 1), default=1))
        return max(1, min(_MOST_THREADS, cores // max(2, self.processes)))

    def _needs(self) -> dict[str, Any]:
        needs: dict[str, Any] = {"num_cpus": self.threads * self.processes, "num_gpus": self.gpus}
        return {**needs, "memory": self._memory} if self._memory else needs

    def _places(self, machine: Mapping[str, float]) -> int:
        """How many runs a machine has room for at a time."""
        asked = {"CPU": self.threads * self.processes, "GPU": self.gpus, "memory": self._memory or 0}
        return int(min(machine.get(name, 0) // amount for name, amount in asked.items() if amount))

    def _check_room(self, machines: Mapping[str, Mapping[str, float]]) -> None:
        if any(map(self._places, machines.values())):
            return
        needs = f"{self.threads * self.processes} CPUs, {self.gpus} GPUs" + (
            f" and {self._memory:,} bytes" if self._memory else ""
        )
        there = "; ".join(
            f"{m.get('CPU', 0):.0f} CPUs, {m.get('GPU', 0):.0f} GPUs, {m.get('memory', 0):,.0f} bytes"
            for m in machines.values()
        )
        raise ConfigError(
            f"Each run needs {needs} on one machine, and no machine of the Ray cluster has that: there are {there}. "
            "Lower threads, gpus, memory or processes_per_run in the configuration, or add a machine."
        )

    def _check_machines(self, machines: Mapping[str, Mapping[str, float]]) -> None:
        """Ask each machine that runs can be on whether it sees the folder, and with what it would work."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        task = self._ray.remote(num_cpus=0, max_retries=0)(_fault)
        asked = {
            number: task.options(scheduling_strategy=On(number, soft=False)).remote(str(self._root), self._software)
            for number, machine in machines.items()
            if self._places(machine)
        }
        faults = []
        for number, answer in asked.items():
            try:
                fault = self._ray.get(answer, timeout=_ANSWER)
            except self._ray.exceptions.RayError as error:
                fault = f"It cannot run adapterlab ({type(error).__name__}: {_first_line(error)})."
            faults += [f"{_name(self._ray, number)}: {fault}"] if fault else []
        if faults:
            raise ConfigError(
                "The machines of the Ray cluster cannot all work on this; nothing was run:\n" + "\n".join(faults)
            )


def _went_away(error: BaseException) -> TrainingError:
    return TrainingError(
        f"The Ray cluster went away ({_first_line(error)}). What is done is kept: start Ray again, and the same "
        "command continues."
    )


def _connect(ray: Any, config: CompareConfig) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or to one of this machine, or else make one on it."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        _check_answers(address)
        ray.init(address=address or "auto", log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        if address is None and isinstance(error, ConnectionError):  # there is none
            cpus = config.processes and config.threads and config.processes * config.threads * config.processes_per_run
            ray.init(address="local", num_cpus=cpus, log_to_driver=False, include_dashboard=False)
            return
        where = f"at RAY_ADDRESS={address}" if address else "on this machine that this process can use"
        raise ConfigError(
            f"There is no Ray cluster {where} ({_first_line(error)}). Start one with ray start --head, or correct "
            "RAY_ADDRESS; without it, a cluster of this machine is used."
        ) from None


def _check_answers(address: str | None) -> None:
    """Raise an OSError where nobody listens at an address: Ray itself tries for seven minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_REACH).close()


def _name(ray: Any, number: str) -> str:
    node = next((node for node in ray.nodes() if node["NodeID"] == number), None)
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" if node else number


def _first_line(error: BaseException) -> str:
    """The first sentence of a message, or its first words."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return textwrap.shorten(line.partition(". ")[0], _WORDS)


def _do(arguments: list[str], log: str, threads: int, cwd: str, software: dict[str, Any], forks: bool) -> int:
    """Do a job on a machine of the cluster; return the exit status of its process."""
    Software(**software).check(f"A machine of the Ray cluster ({os.uname().nodename})")
    process = _start(arguments, Path(log), threads, cwd, forks)
    try:
        while process.poll() is None:  # a wait for the process would not hear of being cancelled
            time.sleep(_POLL)
    except KeyboardInterrupt:  # so Ray says it
        process.terminate()
    return process.wait()


def _start(arguments: list[str], log: Path, threads: int, cwd: str, forks: bool) -> subprocess.Popen[bytes] | Forked:
    if forks and arguments[0] == "-m" and sys.platform == "linux":
        _, module, argument = arguments
        return _prepared(module, threads).start(argument, log, cwd)
    return lifeline.start([sys.executable, *arguments], log, threads, cwd=cwd)


@functools.cache
def _prepared(module: str, threads: int) -> Forks:
    """The process that jobs of this worker of Ray's are forked from; it ends with the worker."""
    return Forks(module, threads)


def _fault(root: str, software: dict[str, Any]) -> str:
    """Say what keeps this machine from working on a comparison; nothing where nothing does."""
    try:
        Software(**software).check("It")
        with tempfile.NamedTemporaryFile(dir=root):
            return ""
    except ConfigError as error:
        return str(error)
    except OSError as error:
        return f"It cannot write {root} ({error.strerror}), which all machines must see under the same path."
