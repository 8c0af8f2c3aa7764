"""Where jobs run: processes of this machine, or a Ray cluster. Each job is a process of its own in either case."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import psutil

from adapterlab.compare.jobs import LOG
from adapterlab.errors import require
from adapterlab.foreign.process_memory import resident

_STOP_SECONDS = 60


class Pool(Protocol):
    """Runs jobs."""

    size: int
    threads: int

    def start(self, folder: Path) -> None:
        """Start the job of a folder."""

    def finished(self) -> list[tuple[Path, int]]:
        """Return folder and exit status of the jobs that have ended since the last call."""

    def has_room(self) -> bool:
        """Whether another job may start."""

    def stop(self) -> None:
        """Ask the running jobs to save what they have, and wait for them."""


def command(folder: Path) -> list[str]:
    """The command line of a job's process."""
    return [sys.executable, "-m", "adapterlab.compare.worker", str(folder)]


def spawn(folder: Path, threads: int, cwd: str | None = None) -> subprocess.Popen[bytes]:
    """Start a job's process; it ends when this one does, because its standard input closes then."""
    environment = {**os.environ, "ADAPTERLAB_LIFELINE": "1", "OMP_NUM_THREADS": str(threads)}
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command(folder), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=cwd
        )


class LocalPool:
    """Processes of this machine.

    Attributes:
        size: most processes at a time.
        threads: of each.
        need: bytes that one more process is expected to take; nothing is started beside others without them.
    """

    def __init__(self, size: int, threads: int):
        self.size, self.threads, self.need = size, threads, 0
        self.running: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, folder: Path) -> None:
        """Start the job of a folder."""
        self.running[folder] = spawn(folder, self.threads)

    def finished(self) -> list[tuple[Path, int]]:
        """Return folder and exit status of the jobs that have ended since the last call."""
        ended = [(folder, code) for folder, p in self.running.items() if (code := p.poll()) is not None]
        for folder, _ in ended:
            stdin = self.running.pop(folder).stdin
            if stdin is not None:
                stdin.close()
        return ended

    def has_room(self) -> bool:
        """Whether another job may start: there is a place, and memory unless nothing else runs."""
        if len(self.running) >= self.size:
            return False
        return not self.running or psutil.virtual_memory().available >= self.need + self._promised()

    def _promised(self) -> int:
        """Bytes that the running processes are still expected to take."""
        return sum(max(0, self.need - resident(process.pid)) for process in self.running.values())

    def stop(self) -> None:
        """Ask the running jobs to save what they have, and wait for them."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running.clear()


class RayPool:
    """Tasks of a Ray cluster; its machines must see the comparison's folder under the same path.

    Attributes:
        size: jobs at a time, from the CPUs (and GPUs) of the cluster.
        threads: CPUs of each.
    """

    def __init__(self, threads: int, *, gpu: bool = False, size: int | None = None):
        require("ray", "ray", "for --engine ray")
        import ray

        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS")
            ray.init(address=address, num_cpus=None if address else size and size * threads, log_to_driver=False)
        self._ray: Any = ray
        there = ray.cluster_resources()
        places = int(there.get("GPU", 0)) if gpu else int(there.get("CPU", 1)) // threads
        self.size, self.threads = min(size or places, max(1, places)), threads
        self._task = ray.remote(num_cpus=threads, num_gpus=1 if gpu else 0, max_retries=0)(_work)
        self.running: dict[Any, Path] = {}

    def start(self, folder: Path) -> None:
        """Start the job of a folder."""
        task = self._task.remote(str(folder.absolute()), self.threads, str(Path.cwd()))
        self.running[task] = folder

    def finished(self) -> list[tuple[Path, int]]:
        """Return folder and exit status of the jobs that have ended since the last call."""
        if not self.running:
            return []
        ended, _ = self._ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        return [(self.running.pop(task), self._status(task)) for task in ended]

    def has_room(self) -> bool:
        """Whether another job may start."""
        return len(self.running) < self.size

    def stop(self) -> None:
        """End the running jobs; what they saved last is kept."""
        for task in self.running:
            self._ray.cancel(task, force=True)
        self.running.clear()

    def _status(self, task: Any) -> int:
        try:
            return int(self._ray.get(task))
        except self._ray.exceptions.RayError:  # the machine or its worker died: as good as a killed process
            return -1


def _work(folder: str, threads: int, cwd: str) -> int:
    return spawn(Path(folder), threads, cwd).wait()
