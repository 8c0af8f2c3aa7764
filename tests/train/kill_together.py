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


def piece(root: Path, folders: list[str], *listeners: Listener) -> int:
    """Train in a child until it ends, and return the signal that ended it."""
    child = os.fork()
    if child == 0:
        common: dict[str, Any] = {"save_every": 3}
        long, short = make_config(root, **common), make_config(root, **common, steps=7, accumulation=1, seed=1)
        for folder in folders:
            outputs = [str(root / folder / name) for name in ("long", "short")]
            configs = [{**fields, "output": output} for fields, output in zip((long, short), outputs, strict=True)]
            endings = fit_many(configs, resume=True, quiet=True, exact=True, callbacks=listeners)
            assert not any(ending.error for ending in endings), endings
        os._exit(0)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    root = Path(sys.argv[1])
    assert piece(root, ["killed"], Kill()) == signal.SIGKILL
    assert piece(root, ["killed", "straight"]) == 0
