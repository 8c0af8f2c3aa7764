"""Train two runs together in pieces: the first process is killed, the second goes on. Used by test_many.

    python kill_together.py ROOT exact|shared

With shared passes both runs are under way when the process is killed, at checkpoints of different steps: afterwards
other micro-batches stand beside each other than in the run that nobody killed.

The parent computes nothing with torch, so that children can be forked from it instead of importing everything again.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from adapterlab.train import Listener, Loop, fit_many
from adapterlab.train.folder import CHECKPOINT, read_state

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_runs import make_config


class Kill(Listener):
    """Kills the process after a step of one of the runs."""

    def settled(self, loop: Loop) -> None:
        if loop.total == 12 and loop.status.step == 8:
            os.kill(os.getpid(), signal.SIGKILL)


def piece(root: Path, folders: list[str], exact: bool, *listeners: Listener) -> int:
    """Train in a child until it ends, and return the signal that ended it."""
    child = os.fork()
    if child == 0:
        common: dict[str, Any] = {"save_every": 3}
        steps = 7 if exact else 20
        long, short = make_config(root, **common), make_config(root, **common, steps=steps, accumulation=1, seed=1)
        for folder in folders:
            outputs = [str(root / folder / name) for name in ("long", "short")]
            configs = [{**fields, "output": output} for fields, output in zip((long, short), outputs, strict=True)]
            endings = fit_many(configs, resume=True, quiet=True, exact=exact, callbacks=listeners)
            assert not any(ending.error for ending in endings), endings
            assert exact or not any(ending.why for ending in endings), endings
        os._exit(0)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    root, exact = Path(sys.argv[1]), sys.argv[2] == "exact"
    assert piece(root, ["killed"], exact, Kill()) == signal.SIGKILL
    steps = [read_state(root / "killed" / name / CHECKPOINT)["status"]["step"] for name in ("long", "short")]
    assert steps == [6, 7 if exact else 15]
    assert piece(root, ["killed", "straight"], exact) == 0
