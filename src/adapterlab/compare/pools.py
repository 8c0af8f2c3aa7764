"""Where jobs run: processes of this machine, or of others. Each job is a process of its own in any case."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import psutil

from adapterlab.compare import lifeline
from adapterlab.compare.config import CompareConfig
from adapterlab.compare.forking import Forked, Forks, can_fork
from adapterlab.compare.jobs import LOG
from adapterlab.errors import ConfigError
from adapterlab.foreign.process_memory import resident_of_all

Ending = int | str  # a process's exit status, or how it was lost with the machine or the worker that ran it
_STOP_SECONDS = 60
_WORKER = "adapterlab.compare.worker"


class Pool(Protocol):
    """Runs jobs."""

    @property
    def size(self) -> int:
        """Most jobs at a time."""

    @property
    def threads(self) -> int:
        """CPU threads of each process of a job."""

    def start(self, folder: Path) -> None:
        """Start the job of a folder."""

    def finished(self) -> list[tuple[Path, Ending]]:
        """Return the folders of the jobs that have ended since the last call, and how."""

    def has_room(self) -> bool:
        """Whether another job may start."""

    def cancel(self, folder: Path) -> None:
        """End the job of a folder at once: another process does it now."""

    def stop(self) -> None:
        """Ask the running jobs to save what they have, and wait for them."""


def command(folder: Path) -> list[str]:
    """The command line of a job's process."""
    return [sys.executable, "-m", _WORKER, str(folder)]


def spawn(folder: Path, threads: int, devices: str | None = None) -> subprocess.Popen[bytes]:
    """Start a job's process; it ends when this one does."""
    return lifeline.start(command(folder), folder / LOG, threads, devices=devices)


class LocalPool:
    """Processes of this machine.

    Attributes:
        size: most jobs at a time.
        threads: of each process of a run.
        need: bytes that one more job is expected to take; nothing is started beside others without them.

    Args:
        size: most jobs at a time.
        threads: of each process of a run.
        devices: GPUs, a group for each job; none: all processes see the same ones.
    """

    def __init__(self, size: int, threads: int, devices: Sequence[str] = ()):
        self.size, self.threads, self.need = size, threads, 0
        self.running: dict[Path, subprocess.Popen[bytes] | Forked] = {}
        self._free, self._used = list(devices), dict[Path, str]()
        self._forks: Forks | None = None

    def start(self, folder: Path) -> None:
        """Start the job of a folder."""
        if self._free:
            self._used[folder] = self._free.pop(0)
        if folder not in self._used and can_fork():
            self._forks = self._forks or Forks(_WORKER, self.threads)
            self.running[folder] = self._forks.start(str(folder), folder / LOG)
        else:
            self.running[folder] = spawn(folder, self.threads, self._used.get(folder))

    def finished(self) -> list[tuple[Path, Ending]]:
        """Return folder and exit status of the jobs that have ended since the last call."""
        ended = [(folder, code) for folder, p in self.running.items() if (code := p.poll()) is not None]
        for folder, _ in ended:
            self._forget(folder)
        return list(ended)

    def has_room(self) -> bool:
        """Whether another job may start: there is a place, and memory unless nothing else runs."""
        if len(self.running) >= self.size:
            return False
        return not self.running or psutil.virtual_memory().available >= self.need + self._promised()

    def _promised(self) -> int:
        """Bytes that the running processes are still expected to take."""
        held = (0 if process.pid is None else resident_of_all(process.pid) for process in self.running.values())
        return sum(max(0, self.need - each) for each in held)

    def cancel(self, folder: Path) -> None:
        """End the job of a folder at once."""
        self.running[folder].kill()
        self.running[folder].wait()
        self._forget(folder)

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
        for folder in list(self.running):
            self._forget(folder)
        if self._forks is not None:
            self._forks.close()
            self._forks = None

    def _forget(self, folder: Path) -> None:
        stdin = self.running.pop(folder).stdin
        if stdin is not None:
            stdin.close()
        if folder in self._used:
            self._free.append(self._used.pop(folder))


class NoPool:
    """Does nothing: the jobs are done by processes that others start.

    Attributes:
        size: how many jobs are expected to run at a time.
        threads: of each; 0: as the machine has it.
    """

    def __init__(self, size: int, threads: int):
        self.size, self.threads = size, threads

    def start(self, folder: Path) -> None:
        """Never called: there is no room."""
        raise AssertionError(folder)

    def finished(self) -> list[tuple[Path, Ending]]:
        """Nothing."""
        return []

    def has_room(self) -> bool:
        """No."""
        return False

    def cancel(self, folder: Path) -> None:
        """Never called: nothing runs."""
        raise AssertionError(folder)

    def stop(self) -> None:
        """Leave those who work alone."""


def local(config: CompareConfig) -> LocalPool:
    """Return a pool of this machine's processes, as many as a configuration says or cores and GPUs allow.

    Raises:
        ConfigError: a run needs more GPUs than there are.
    """
    import torch

    gpu = (config.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1
    groups = _groups(config.gpus) if config.gpus else []
    most, ranks = config.processes or len(groups) or (1 if gpu else None), config.processes_per_run
    if groups and most:
        share = cores // most
    elif gpu or most == 1:
        share = cores
    else:  # a small model gains little from many threads, and runs of one thread share cores without loss
        share = ranks * min(4, cores // max(2, ranks))
    threads = config.threads or max(1, share // ranks)
    size = most or max(1, cores // (threads * ranks))
    return LocalPool(min(size, len(groups)) if groups else size, threads, groups)


def _groups(each: int) -> list[str]:
    """The GPUs of this machine in groups of so many."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = [name for name in visible.split(",") if name] if visible is not None else None
    names = there if there is not None else [str(number) for number in range(torch.cuda.device_count())]
    if len(names) < each:
        raise ConfigError(
            f"gpus={each}: each run needs {each} GPUs, and this machine has {len(names)}. Lower gpus, or let runs go "
            "elsewhere (--engine ray, --engine slurm)."
        )
    return [",".join(names[start : start + each]) for start in range(0, len(names) - each + 1, each)]
