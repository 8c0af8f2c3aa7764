"""A process that ends with whoever started it: both ends of the line."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

STOPPED = 130  # exit status of a process that was asked to stop, and saved what it had
_SET = "ADAPTERLAB_LIFELINE"


def start(
    command: Sequence[str], log: Path, threads: int, *, cwd: str | None = None, devices: str | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that ends when this one does, because its standard input closes then.

    It has a session of its own: what is pressed in a terminal reaches this process alone, which tells it once.

    Args:
        command: of the process, which calls `stop_with_parent`.
        log: file to which its output is added.
        threads: CPU threads it may use.
        cwd: where it works; None: here.
        devices: GPUs it may see, as in `CUDA_VISIBLE_DEVICES`; None: those of this process.
    """
    environment = environment_of(threads, devices)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=cwd,
            start_new_session=True,
        )  # fmt: skip


def environment_of(threads: int, devices: str | None = None) -> dict[str, str]:
    """Return the environment of a process that calls `stop_with_parent`."""
    environment = {**os.environ, _SET: "1", "OMP_NUM_THREADS": str(threads)}
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    return environment


def stop_with_parent() -> None:
    """End when the process that holds the other end of the standard input ends, however that happens."""

    def watch() -> None:
        while os.read(0, 1):  # not through sys.stdin, whose lock would be in the way when Python ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # a training saves its checkpoint and leaves by itself
        os._exit(STOPPED)

    if os.environ.get(_SET):
        threading.Thread(target=watch, daemon=True).start()
