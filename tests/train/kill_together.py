"""Train two runs together in pieces: the first process is killed, the second goes on. Used by test_many.

    python kill_together.py ROOT

The parent computes nothing with torch, so that children can be forked from it instead of importing everything again.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from adapterlab.train import Listener, Loop, fit_many

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_runs import make_config


class Kill(Listener):
    """Kills the process after a step of one of the runs."""

    def settled(self, loop: Loop) -> None:
        if loop.total == 12 and loop.status.step == 8:
            os.kill(os.getpid(), signal.SIGKILL)


def piece(root: Path, folder: str, *listeners: Listener) -> int:
    """Train in a child until it ends, and return the signal that ended it."""
    child = os.fork()
    if child == 0:
        common: dict[str, Any] = {"save_every": 3}
        long, short = make_config(root, **common), make_config(root, **common, steps=7, accumulation=1, seed=1)
        configs = [{**long, "output": str(root / folder / "long")}, {**short, "output": str(root / folder / "short")}]
        endings = fit_many(configs, resume=True, quiet=True, exact=True, callbacks=listeners)
        os._exit(any(ending.error is not None for ending in endings))
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    root = Path(sys.argv[1])
    assert piece(root, "killed", Kill()) == signal.SIGKILL
    assert piece(root, "killed") == 0
    assert piece(root, "straight") == 0
