"""The plan that is shown before a run starts, as `adapterlab plan CONFIG.yaml` left it."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

import adapterlab
from adapterlab.errors import AdapterlabError, ConfigError
from adapterlab.io.atomic import write_text
from adapterlab.models.entries import home
from adapterlab.plan import process
from adapterlab.plan.device import Device
from adapterlab.plan.extrapolate import extrapolated
from adapterlab.plan.planning import arguments, described, setup_of
from adapterlab.plan.report import size
from adapterlab.plan.result import Plan
from adapterlab.plan.setup import Setup
from adapterlab.plan.simulate import Trace, simulate

if TYPE_CHECKING:
    from adapterlab.train.config import TrainConfig

_TRIFLE = 0.005  # of a device's memory


class _Late(Exception):
    """There is no time for another simulation."""


def early_plan(config: TrainConfig, seconds: float = 0.0) -> Plan | None:
    """Return the plan of a run: a kept one, or a new one if it can be made within the time; else None.

    Args:
        config: of the run.
        seconds: for simulating; none by default, so that a run never waits for its plan.
    """
    end = time.perf_counter() + seconds
    try:
        place = Device.parse(config.device)
        given = arguments(config)
        setup = setup_of(config.model, given.pop("method"), **given, kind=place.kind)
        if not _matters(setup, place):
            return None
        file = _file(setup, place)
        if file.is_file():
            return replace(Plan.from_json(json.loads(file.read_text(encoding="utf-8"))), limit=_available(place))
        if not seconds:
            return None
        found = described(config.model, setup, extrapolated(setup, _within(end)), place)
    except (_Late, AdapterlabError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError):
        return None  # a run needs no plan
    remember(setup, place, found)
    return replace(found, limit=_available(place))


def remember(setup: Setup, place: Device, found: Plan) -> None:
    """Keep a plan for the next run of the same kind."""
    file = _file(setup, place)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(found.to_json()))
    except OSError:  # a full or read-only disk is no reason not to train
        return


def check_fits(config: TrainConfig, found: Plan | None) -> None:
    """Refuse a run that cannot fit even with the shortest rows.

    The rows of a run are often much shorter than `data.max_length`, so what is live whatever the rows are decides.

    Raises:
        ConfigError: it needs more than the device has.
    """
    if found is None or found.limit is None:
        return
    resting = found.base + found.adapter + found.state
    if resting > found.limit:
        raise ConfigError(
            f"{found.method} on {found.model} cannot fit on {found.device.name}: weights, adapter and optimizer alone "
            f"take {size(resting)} of {size(found.limit)}. Pack the weights (quantize=nf4), choose a method that "
            "trains less (adapterlab plan --all-methods), or force the run: adapterlab train --force."
        )


def line(found: Plan) -> str:
    """Say a plan in one line."""
    limit = f" of {size(found.limit)}" if found.limit is not None else ""
    return (
        f"Plan: {size(found.process)}{limit} at the peak with {found.batch} x {found.length:,} tokens, the longest "
        f"rows allowed (± {100 * found.band[1]:.0f} %); {found.verdict}. Details: adapterlab plan"
    )


def _within(end: float) -> Any:
    """A simulation that gives up when the next would end too late."""
    last = 0.0

    def run(setup: Setup) -> Trace:
        nonlocal last
        began = time.perf_counter()
        layers = setup.config.get_text_config().num_hidden_layers
        if began + last > end or layers > 12:
            raise _Late
        trace = simulate(setup)
        last = time.perf_counter() - began
        return trace

    return run


def _matters(setup: Setup, place: Device) -> bool:
    """Say whether the weights are more than a trifle for the device."""
    text: Any = setup.config.get_text_config()
    width, inner = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    weights = text.num_hidden_layers * (3 * width * inner + 2 * width * width) + text.vocab_size * width
    return place.memory is None or 2 * weights > _TRIFLE * place.memory


def _available(place: Device) -> int | None:
    """Memory that a run can have now: on a CPU, what other programs leave."""
    if place.kind == "cpu" and place.name == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    return place.memory


def _file(setup: Setup, place: Device) -> Path:
    """Where a plan is kept; everything that it depends on is in the name."""
    training = setup.training.model_dump(mode="json", exclude={"seed", "lr", "trackers", "log_every"})
    parts = [
        setup.config.to_json_string(), setup.method.id, setup.method.model_dump(mode="json"), training, setup.batch,
        setup.length, setup.labelled, setup.precision, setup.quantize, place.kind, place.memory, process.figures(),
        adapterlab.__version__, torch.__version__, transformers.__version__, _newest(),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return home() / "plans" / f"{digest[:32]}.json"


def _newest() -> int:
    """When a file of the package changed last."""
    return max(file.stat().st_mtime_ns for file in Path(adapterlab.__file__).parent.rglob("*.py"))
