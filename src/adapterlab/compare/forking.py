"""A process that has imported what jobs need, and splits itself for each of them.

A job spends seconds on imports before it does anything. One process does that once (`python -m
adapterlab.compare.forking MODULE ...`) and is forked for each job; the child goes on as `MODULE.main(argument)`, in a
session of its own and with its output in a log. Nothing else is shared: what a job changes is its own.

Only where that is safe: on Linux, without a GPU, and as long as the process has a single thread. Elsewhere jobs start
as they would without it.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from adapterlab.compare import lifeline
from adapterlab.foreign.process_memory import pages_of_files, read_in

HEAVY = (
    "transformers.modeling_utils", "transformers.models.auto.modeling_auto", "transformers.generation.utils",
    "transformers.modeling_layers", "datasets", "tokenizers",
)  # fmt: skip
_LOST = -int(signal.SIGKILL)  # the status of a job whose end nobody has seen
# Libraries that make threads when they are loaded: numpy's, and the heap of pyarrow.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


class Forks:
    """Jobs that a prepared process starts; it ends with this one, and they with it.

    Args:
        module: whose `main(argument)` does a job and returns its exit status.
        threads: CPU threads of each.
        also: modules that jobs will import.
    """

    def __init__(self, module: str, threads: int, also: Sequence[str] = HEAVY):
        self.module, self.threads = module, threads
        environment = {**_ONE_THREAD, **lifeline.environment_of(threads)}
        command = [sys.executable, "-m", "adapterlab.compare.forking", module, *also]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            start_new_session=True, bufsize=0,
        )  # fmt: skip
        self._numbers = itertools.count()
        self._heard = b""
        self.pids: dict[int, int] = {}
        self.statuses: dict[int, int] = {}
        self.ended = self.closed = False

    def start(self, argument: str, log: Path, cwd: str | None = None) -> Forked:
        """Start a job as soon as the process is prepared; by itself where that cannot be forked.

        Args:
            argument: of the module's `main`.
            log: file to which its output is added.
            cwd: where it works; None: here.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        job = Forked(self, next(self._numbers), argument, log, cwd or os.getcwd())
        self.ask({"job": job.number, "argument": argument, "log": str(log), "cwd": job.cwd})
        return job

    def ask(self, said: Mapping[str, Any]) -> None:
        """Tell the process something."""
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(json.dumps(said).encode() + b"\n")  # shorter than a pipe holds: nothing is left of it
        except (OSError, ValueError):  # it has ended, or was closed
            self.ended = True

    def listen(self, timeout: float = 0) -> None:
        """Hear what the process says within so many seconds: who was started, and who has ended."""
        stream = self._process.stdout
        assert stream is not None
        while not self.ended and select.select([stream], [], [], timeout)[0]:
            data = os.read(stream.fileno(), 1 << 16)
            self.ended = not data
            *lines, self._heard = (self._heard + data).split(b"\n")
            for line in lines:
                said = json.loads(line)
                if "pid" in said:
                    self.pids[said["job"]] = said["pid"]
                else:
                    self.statuses[said["job"]] = said["status"]
            timeout = 0

    def close(self) -> None:
        """End the process, and with it all that runs."""
        self._process.terminate()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self.ended = self.closed = True
        self._process.wait()


class Forked:
    """A job that a prepared process started; it can be asked as `subprocess.Popen` can."""

    def __init__(self, forks: Forks, number: int, argument: str, log: Path, cwd: str):
        self._forks, self.number, self._argument, self._log, self.cwd = forks, number, argument, log, cwd
        self._itself: subprocess.Popen[bytes] | None = None

    @property
    def stdin(self) -> Any:
        """What keeps it alive while it is open, where that is here."""
        return None if self._itself is None else self._itself.stdin

    @property
    def pid(self) -> int | None:
        """Its number in the system, None where it has not been started yet."""
        plain = self._plain()
        return self._forks.pids.get(self.number) if plain is None else plain.pid

    def poll(self) -> int | None:
        """Its exit status, the negative number of the signal that ended it, or None while it runs."""
        if (plain := self._plain()) is not None:
            return plain.poll()
        status = self._forks.statuses.get(self.number)
        return _LOST if status is None and self._forks.ended else status

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not, in so many seconds.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            left = None if until is None else until - time.monotonic()
            if self._itself is not None:
                return self._itself.wait(left)
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired("a job", timeout or 0)
            self._forks.listen(1.0 if left is None else min(left, 1.0))
        return status

    def terminate(self) -> None:
        """Ask it to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if (plain := self._plain()) is not None:
            plain.send_signal(number)
        else:
            self._forks.ask({"job": self.number, "signal": int(number)})

    def _plain(self) -> subprocess.Popen[bytes] | None:
        """The process that was started by itself, because nobody can fork it."""
        forks = self._forks
        forks.listen()
        if self._itself is None and forks.ended and not forks.closed and self.number not in forks.pids:
            command = [sys.executable, "-m", forks.module, self._argument]
            self._itself = lifeline.start(command, self._log, forks.threads, cwd=self.cwd)
        return self._itself


def can_fork() -> bool:
    """Say whether jobs may be started so here."""
    from adapterlab.foreign.processor import accelerated

    return sys.platform == "linux" and hasattr(os, "pidfd_open") and not accelerated()


class _Prepared:
    """The process itself."""

    def __init__(self, module: str, also: Sequence[str]):
        self.answers = os.dup(1)
        os.dup2(2, 1)  # what modules print is no answer
        for name in also:
            importlib.import_module(name)
        self.main = importlib.import_module(module).main
        # What other threads hold, a child would wait for in vain.
        if not can_fork() or len(os.listdir("/proc/self/task")) > 1:
            sys.exit(1)
        self.running: dict[int, tuple[int, int, int]] = {}  # by number: process, its handle, its line of life
        gc.collect()
        gc.freeze()  # so that children do not write to what they share
        self.pages = pages_of_files()

    def serve(self) -> None:
        """Do what is said until nobody says anything any more."""
        heard, poll = b"", select.poll()
        poll.register(0, select.POLLIN | select.POLLHUP)
        while True:
            for handle, _ in poll.poll():
                if handle:
                    poll.unregister(handle)
                    self._end(handle)
                    continue
                data = os.read(0, 1 << 16)
                if not data:
                    return
                *lines, heard = (heard + data).split(b"\n")
                for line in lines:
                    said = json.loads(line)
                    if "signal" in said:
                        if said["job"] in self.running:
                            os.kill(self.running[said["job"]][0], said["signal"])
                    else:
                        poll.register(self._start(**said), select.POLLIN)

    def _start(self, job: int, argument: str, log: str, cwd: str) -> int:
        end, line = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(line)
            self._become(argument, log, cwd, end)
        os.close(end)
        handle = os.pidfd_open(pid)
        self.running[job] = (pid, handle, line)
        self._say({"job": job, "pid": pid})
        return handle

    def _end(self, handle: int) -> None:
        job = next(job for job, held in self.running.items() if held[1] == handle)
        pid, _, line = self.running.pop(job)
        _, status = os.waitpid(pid, 0)
        os.close(handle)
        os.close(line)
        self._say({"job": job, "status": os.waitstatus_to_exitcode(status)})

    def _become(self, argument: str, log: str, cwd: str, end: int) -> NoReturn:
        """Be the process of a job."""
        os.setsid()
        os.dup2(end, 0)
        os.close(end)
        stream = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.close(stream)
        os.close(self.answers)
        for _, handle, line in self.running.values():  # of others, whose end would not be seen otherwise
            os.close(handle)
            os.close(line)
        os.chdir(cwd)
        read_in(self.pages)
        sys.argv = [self.main.__module__, argument]
        lifeline.stop_with_parent()
        sys.exit(self.main(argument))

    def _say(self, said: Mapping[str, Any]) -> None:
        os.write(self.answers, json.dumps(said).encode() + b"\n")


if __name__ == "__main__":
    _Prepared(sys.argv[1], sys.argv[2:]).serve()
