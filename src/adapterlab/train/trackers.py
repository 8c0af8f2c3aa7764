"""Experiment trackers, through accelerate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterlab.errors import MissingDependencyError, require
from adapterlab.train.loop import Listener, Loop, Record

PROJECT = "adapterlab"


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of trackers are there.

    Raises:
        MissingDependencyError: one is not.
    """
    for name in names:
        if name == "tensorboard":
            require(name, "trackers", "for training.trackers=[tensorboard]")
        else:
            import importlib.util

            if importlib.util.find_spec(name) is None:
                raise MissingDependencyError(
                    f"training.trackers={list(names)} needs the package {name!r}, which is not installed. Install it "
                    f"with: pip install {name}"
                )


class Trackers(Listener):
    """Sends metrics to the trackers of a loop's accelerator."""

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = {key: v if isinstance(v, (int, float, bool, str)) else str(v) for key, v in settings.items()}

    def started(self, loop: Loop) -> None:
        """Open them."""
        loop.accelerator.init_trackers(PROJECT, config=self.settings)

    def stepped(self, loop: Loop, record: Record) -> None:
        """Send the metrics of a step now and then."""
        if record["step"] % loop.training.log_every == 0:
            loop.accelerator.log({f"train/{k}": v for k, v in record.items() if k != "step"}, step=record["step"])

    def evaluated(self, loop: Loop, record: Record, improved: bool) -> None:
        """Send the evaluation loss."""
        loop.accelerator.log({"eval/loss": record["eval_loss"]}, step=record["step"])

    def closed(self, loop: Loop) -> None:
        """Close them."""
        for tracker in getattr(loop.accelerator, "trackers", []):
            tracker.finish()  # end_training would also end the process group, which is not ours alone
