"""Run one training in pieces: each piece is a child process that is killed at another point. Used by test_resume.

    python kill_and_resume.py ROOT

The parent computes nothing with torch, so that children can be forked from it instead of importing everything again.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from adapterlab.io import atomic
from adapterlab.train import Listener, Loop, fit
from adapterlab.train.folder import CHECKPOINT, METRICS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_runs import make_config


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAfter(Listener):
    """Kills the process after a step, before or after its evaluation and checkpoint."""

    def __init__(self, step: int, event: str):
        self.step = step
        setattr(self, event, self._strike)

    def _strike(self, loop: Loop, *details: Any) -> None:
        if loop.status.step == self.step:
            die()


def kill_while_writing_a_checkpoint() -> None:
    """Half of the file is written."""
    save = torch.save

    def half(state: Any, stream: Any) -> None:
        save(state, stream)
        stream.flush()
        os.truncate(stream.fileno(), stream.tell() // 2)
        die()

    torch.save = half


def kill_between_the_renames_of_an_adapter() -> None:
    """The old folder has moved away and the new one is not there yet."""
    rename = Path.rename

    def once(self: Path, target: Path) -> Path:
        if self.name.endswith(".part") and Path(target).name == "best":
            die()
        return rename(self, target)

    atomic.Path.rename = once


def piece(
    root: Path, listeners: Sequence[Listener] = (), sabotage: Callable[[], None] | None = None, output: str = "run"
) -> int:
    """Train in a child until it ends, and return the signal that ended it."""
    child = os.fork()
    if child == 0:
        if sabotage:
            sabotage()
        fit({**make_config(root), "output": str(root / output)}, resume=True, quiet=True, callbacks=listeners)
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def main(root: Path) -> None:
    run = root / "run"
    killed = [
        ([KillAfter(3, "stepped")], None),  # before the first checkpoint, which is at step 5
        ([KillAfter(4, "evaluated")], None),  # in the middle of what belongs to a step
        ([], kill_while_writing_a_checkpoint),
        ([KillAfter(7, "settled")], None),  # between two checkpoints
        ([], kill_between_the_renames_of_an_adapter),  # the new best of step 8
        ([KillAfter(10, "settled")], None),  # just after a checkpoint
        ([KillAfter(12, "trained")], None),  # after everything but the last adapter
    ]
    for listeners, sabotage in killed:
        assert piece(root, listeners, sabotage) == signal.SIGKILL
        print((run / CHECKPOINT).is_file(), len((run / METRICS).read_text().splitlines()), flush=True)
    assert piece(root) == 0
    assert piece(root, output="straight") == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
