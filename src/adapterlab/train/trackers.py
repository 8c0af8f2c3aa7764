"""Experiment trackers, through accelerate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from adapterlab.core.usage import LOAD, means
from adapterlab.errors import MissingDependencyError, TrainingError, require
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
    """Sends metrics to the trackers of a loop's accelerator.

    One that does not start ends the run before its first step. One that fails later is left out from then on with a
    warning: the run's own `metrics.jsonl` has everything.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = {key: v if isinstance(v, (int, float, bool, str)) else str(v) for key, v in settings.items()}
        self.open: list[Any] = []

    def started(self, loop: Loop) -> None:
        """Open them, one by one.

        Raises:
            TrainingError: one does not start.
        """
        accelerator = loop.accelerator
        names = list(accelerator.log_with)
        for name in names:
            accelerator.log_with, accelerator.trackers = [name], []
            try:
                accelerator.init_trackers(PROJECT, config=self.settings)
            except Exception as error:  # whatever a tracker's package raises
                raise TrainingError(
                    f"The tracker {str(name)!r} did not start: {type(error).__name__}: {error}. Mend what it says, or "
                    f"leave it out of training.trackers={[str(one) for one in names]}."
                ) from error
            self.open += accelerator.trackers
        accelerator.log_with, accelerator.trackers = names, list(self.open)

    def stepped(self, loop: Loop, record: Record) -> None:
        """Send the metrics of a step now and then."""
        if record["step"] % loop.training.log_every == 0:
            load = record.get(LOAD)
            values = {k: v for k, v in record.items() if k not in ("step", LOAD)} | (means(load) if load else {})
            self._send({f"train/{k}": v for k, v in values.items()}, record["step"])

    def evaluated(self, loop: Loop, record: Record, improved: bool) -> None:
        """Send the evaluation loss."""
        each = {f"eval/loss/{name}": loss for name, loss in record.get("eval_losses", {}).items()}
        self._send({"eval/loss": record["eval_loss"], **each}, record["step"])

    def closed(self, loop: Loop) -> None:
        """Close them."""
        for tracker in list(self.open):
            self._try(tracker, "finish")  # end_training would also end the process group, which is not ours alone

    def _send(self, values: dict[str, Any], step: int) -> None:
        for tracker in list(self.open):
            self._try(tracker, "log", values, step=step)

    def _try(self, tracker: Any, verb: str, *args: Any, **kwargs: Any) -> None:
        try:
            getattr(tracker, verb)(*args, **kwargs)
        except Exception as error:  # whatever a tracker's package raises
            self.open.remove(tracker)
            warnings.warn(
                f"The tracker {tracker.name!r} failed at {verb} and is left out from here on: {type(error).__name__}: "
                f"{error}. The run goes on; metrics.jsonl in its folder has all metrics.",
                stacklevel=2,
            )
