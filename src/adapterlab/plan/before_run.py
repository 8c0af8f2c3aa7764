"""The plan that is shown before a run starts: a kept one, or one that a child process makes while the run loads."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from adapterlab.errors import AdapterlabError, ConfigError
from adapterlab.foreign.model import output_head, text_config
from adapterlab.io.atomic import write_text
from adapterlab.json_text import digest, parsed
from adapterlab.models.loading import PRECISIONS
from adapterlab.paths import home
from adapterlab.plan import process
from adapterlab.plan.child import Child, each, processes
from adapterlab.plan.device import Device
from adapterlab.plan.extrapolate import extrapolated
from adapterlab.plan.joint import together
from adapterlab.plan.parallel import PLACED, SPLIT
from adapterlab.plan.planning import arguments, described, place_of, setup_of
from adapterlab.plan.report import size
from adapterlab.plan.result import Plan
from adapterlab.plan.setup import Setup
from adapterlab.plan.simulate import Trace, build, simulate
from adapterlab.version import __version__

if TYPE_CHECKING:
    from adapterlab.train.config import TrainConfig

_TRIFLE = 0.005  # of a device's memory: weights below need no plan
_STAKE = 0.5  # weights above may not fit: the run waits for its plan, but not long
WAIT = 2.0
PATIENCE = 600.0  # seconds after which a child gives up


@dataclass(frozen=True)
class Start:
    """Which processes train a run.

    Attributes:
        processes: how many.
        here: on this machine.
        kind: how they are divided, where that is known better than the configuration says it.
    """

    processes: int = 1
    here: int = 1
    kind: str | None = None


ALONE = Start()


class _Late(Exception):
    """There is no time for another simulation."""


def early_plan(config: TrainConfig, seconds: float = 0.0, start: Start = ALONE) -> Plan | None:
    """Return the plan of a run: a kept one, or a new one if it can be made within the time; else None.

    Args:
        config: of the run.
        seconds: for simulating; none by default, so that a run never waits for its plan.
        start: which processes train it.
    """
    end = time.perf_counter() + seconds
    try:
        subject = _subject(config, start)
        if subject is None:
            return None
        setup, place = subject
        kept = _kept(setup, place)
        if kept is not None or not seconds:
            return kept
        found = described(config.model, setup, extrapolated(setup, _within(end)), place)
    except (_Late, AdapterlabError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError):
        return None  # a run needs no plan
    remember(setup, place, found)
    return replace(found, limit=_available(place))


@contextlib.contextmanager
def announced(
    config: TrainConfig,
    tell: Callable[[str], None],
    *,
    force: bool = False,
    make: bool = True,
    at_stake: bool = False,
    start: Start = ALONE,
) -> Iterator[None]:
    """Tell the plan of a run that loads inside this context, and refuse what cannot fit before it does.

    A kept plan is told at once. Else a child process makes one while the run loads; it is told when the context ends,
    if it is there by then. Only where the weights are a large part of the memory the run waits for it first, two
    seconds at most. The run is refused for what is certain then: the weights, or with a plan adapter and optimizer too.

    Args:
        config: of the run.
        tell: prints a line.
        force: refuse nothing.
        make: whether to make a plan where none is kept.
        at_stake: do all this only where the weights are a large part of the memory.
        start: which processes train it; each is planned alike.

    Raises:
        ConfigError: the run cannot fit.
    """
    subject = _subject(config, start)
    if subject is None or (at_stake and not _at_stake(*subject)):
        yield
        return
    found = _kept(*subject)
    beside = Beside(config, start) if make and found is None else None
    try:
        if _at_stake(*subject):
            least = None if force or found is not None else _least_held(subject[0])
            found = found or (beside.result(WAIT) if beside else None)
            if not force:
                check_fits(config, found)
                _check_weights(config, subject[1], least if found is None else None)
        if found is not None:
            tell(line(found))
        yield
        late = beside.result() if beside and found is None else None
        if late is not None:
            tell(line(late))
    finally:
        if beside:
            beside.stop()


def check(config: TrainConfig, tell: Callable[[str], None]) -> None:
    """Refuse a run whose weights are a large part of the memory, if it cannot fit; any other costs no time.

    Raises:
        ConfigError: the run cannot fit.
    """
    with announced(config, tell, at_stake=True):
        return


def needed(
    configs: Sequence[TrainConfig], tell: Callable[[str], None], *, force: bool = False, make: bool = True
) -> tuple[int | None, list[int | None]]:
    """Say how much room there is beside a base, and what each run needs of it, before anything is loaded.

    Args:
        configs: of the runs.
        tell: prints a line.
        force: refuse nothing.
        make: whether to make plans where none are kept.

    Returns:
        Bytes beside the base (None: no bound, as the model is a trifle for the device or nothing is known of it), and
        for each run its bytes, or None where they are not known.

    Raises:
        ConfigError: a run cannot fit even by itself.
    """
    if is_trifle(configs[0]):
        return None, [0] * len(configs)
    if make:
        jobs: dict[str, Any] = {str(i): (early_plan, (config, PATIENCE), {}) for i, config in enumerate(configs)}
        tell(f"Planning the memory of {len(configs)} runs ...")
        found, _ = each(jobs, processes())
        plans = [found.get(str(i)) for i in range(len(configs))]
    else:
        plans = [early_plan(config) for config in configs]
    for config, plan in zip(configs, plans, strict=True):
        if not force:
            check_fits(config, plan)
    known = [plan for plan in plans if plan is not None]
    if not known:
        return None, [None] * len(configs)
    joint = together(known)
    needs = dict(zip(map(id, known), joint.needs, strict=True))
    for config, plan in zip(configs, plans, strict=True):
        tell(f"{config.output}: {line(plan)}" if plan else f"{config.output}: there is no plan, so it runs by itself")
    return joint.room, [needs.get(id(plan)) for plan in plans]


class Beside:
    """A plan in the making, in a process that gives way to others."""

    def __init__(self, config: TrainConfig, start: Start = ALONE):
        self.child, self._found = Child(), None
        self._thread = threading.Thread(target=self._run, args=(config, start), daemon=True)
        self.child.start()
        self._thread.start()

    def _run(self, config: TrainConfig, start: Start) -> None:
        with contextlib.suppress(AdapterlabError, OSError, RuntimeError, TypeError):  # a run needs no plan
            if hasattr(os, "nice"):
                self.child.call(os.nice, 10)
            self._found = self.child.call(early_plan, config, PATIENCE, start)

    def result(self, seconds: float = 0.0) -> Plan | None:
        """Return the plan, if it is there within the time."""
        self._thread.join(seconds)
        return self._found

    def stop(self) -> None:
        """Give up what is not there yet."""
        self.child.stop()
        self._thread.join()
        self.child.close()


def least_weights(setup: Setup) -> int:
    """Count the bytes that the base weights take at least, without making them."""
    with torch.device("meta"):
        model = build(replace(setup, quantize=None), real=True)
    head = output_head(model)
    packed = {"nf4": 0.5, "int8": 1.0}.get(setup.quantize or "")
    shrunk = {
        id(module.weight)
        for module in model.modules()
        if packed is not None and isinstance(module, torch.nn.Linear) and module is not head
    }
    return int(sum(p.numel() * (packed if id(p) in shrunk and packed else p.itemsize) for p in model.parameters()))


def _least_held(setup: Setup) -> int:
    """Bytes that one device holds of the base weights at least."""
    return least_weights(setup) // _parts(setup)


def _parts(setup: Setup) -> int:
    """Among how many devices the base weights are split."""
    return setup.parallel.devices if setup.parallel and setup.parallel.kind in SPLIT else 1


def is_trifle(config: TrainConfig) -> bool:
    """Say whether the weights of a run are so few for its device that its memory needs no plan."""
    known = _known(config)
    return known is not None and not _matters(*known)


def _subject(config: TrainConfig, start: Start) -> tuple[Setup, Device] | None:
    """What to plan; None where it cannot be known yet, or is a trifle for the device."""
    known = _known(config, start)
    return known if known is not None and _matters(*known) else None


def _known(config: TrainConfig, start: Start = ALONE) -> tuple[Setup, Device] | None:
    """The setup of a run and its device; None where they cannot be known yet, or parts wait elsewhere."""
    try:
        if config.cpu_offload and start.processes > 1:
            return None
        place = place_of(config, start.here)
        given = arguments(config, start.processes if start.processes > 1 else None)
        given |= {"parallel": start.kind} if start.kind and "parallel" in given else {}
        return setup_of(config.model, given.pop("method"), **given, kind=place.kind), place
    except (AdapterlabError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError):
        return None  # the run itself will say what is wrong


def _kept(setup: Setup, place: Device) -> Plan | None:
    """The plan that an earlier run left, for the memory of now."""
    try:
        kept = parsed(_file(setup, place).read_text(encoding="utf-8"))
        if kept["sha256"] != digest(kept["plan"]):
            return None  # damaged: a wrong figure could refuse a run that fits
        found = Plan.from_json(kept["plan"])
    except (AdapterlabError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError):
        return None  # absent, or of no use: a run needs no plan
    return replace(found, limit=_available(place))


def _at_stake(setup: Setup, place: Device) -> bool:
    limit = _available(place)
    return limit is not None and _guessed(setup) > _STAKE * limit


def _check_weights(config: TrainConfig, place: Device, least: int | None) -> None:
    limit = _with_spare(place, _available(place))
    if least is not None and limit is not None and least > limit:
        raise _refusal(config, place, "its weights alone take", least, limit)


def _refusal(config: TrainConfig, place: Device, what: str, count: int, limit: int) -> ConfigError:
    where = f"{place} and in the CPU's memory" if place.spills else str(place)
    return ConfigError(
        f"{config.method['name']} on {config.model} cannot fit on {where}: {what} {size(count)} of {size(limit)}. "
        "Pack the weights (quantize=nf4), choose a method that trains less (adapterlab plan --all-methods) or a "
        "smaller model, or force the run: adapterlab train --force."
    )


def remember(setup: Setup, place: Device, found: Plan) -> None:
    """Keep a plan for the next run of the same kind."""
    file = _file(setup, place)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        plan = json.loads(json.dumps(found.to_json()))
        write_text(file, json.dumps({"plan": plan, "sha256": digest(plan)}))
    except OSError:  # a full or read-only disk is no reason not to train
        return


def check_fits(config: TrainConfig, found: Plan | None) -> None:
    """Refuse a run that cannot fit even with the shortest rows.

    The rows of a run are often much shorter than `data.max_length`, so what is live whatever the rows are decides.

    Raises:
        ConfigError: it needs more than the device has.
    """
    limit = None if found is None else _with_spare(found.device, found.limit)
    if found is None or limit is None:
        return
    resting = found.base + found.adapter + found.state
    if resting > limit:
        what = "weights, adapter and optimizer alone take"
        raise _refusal(config, found.device, what, resting, limit)


def line(found: Plan) -> str:
    """Say a plan in one line."""
    limit = f" of {size(found.limit)}" if found.limit is not None else ""
    each = ""
    if found.parallel:
        each = f" on {'all' if found.parallel == PLACED else 'each of'} {found.devices} devices ({found.parallel})"
    return (
        f"Plan: {size(found.process)}{limit}{each} at the peak with {found.batch} x {found.length:,} tokens, the "
        f"longest rows allowed (± {100 * found.band[1]:.0f} %); {found.verdict}. Details: adapterlab plan"
    )


def _within(end: float) -> Any:
    """A simulation that gives up when the next would end too late."""
    last = 0.0

    def run(setup: Setup) -> Trace:
        nonlocal last
        began = time.perf_counter()
        layers = text_config(setup).num_hidden_layers
        if began + last > end or layers > 12:
            raise _Late
        trace = simulate(setup)
        last = time.perf_counter() - began
        return trace

    return run


def _matters(setup: Setup, place: Device) -> bool:
    """Say whether the weights are more than a trifle for the device."""
    return place.memory is None or _guessed(setup) > _TRIFLE * place.memory


def _guessed(setup: Setup) -> float:
    """Bytes that a device holds of the weights, roughly, without building the model."""
    text: Any = text_config(setup)
    width, inner = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    weights = text.num_hidden_layers * (3 * width * inner + 2 * width * width) + text.vocab_size * width
    each = {"nf4": 0.56, "int8": 1.0}.get(setup.quantize or "", PRECISIONS[setup.precision].itemsize)
    return float(weights * each / _parts(setup))


def _available(place: Device) -> int | None:
    """Memory that a process of a run can have now: on a CPU, what other programs leave."""
    return _left() // place.sharers if place.kind == "cpu" and place.name == "cpu" else place.memory


def _with_spare(place: Device, limit: int | None) -> int | None:
    """A limit, and what the CPU's memory adds to it where weights may wait there."""
    return limit if limit is None or not place.spills else limit + _left()


def _left() -> int:
    """What other programs leave of the CPU's memory."""
    import psutil

    return int(psutil.virtual_memory().available)


def _file(setup: Setup, place: Device) -> Path:
    """Where a plan is kept; everything that it depends on is in the name."""
    training = setup.training.model_dump(mode="json", exclude={"seed", "lr", "trackers", "log_every"})
    parts = [
        setup.config.to_json_string(), setup.method.id, setup.method.model_dump(mode="json"), training, setup.batch,
        setup.length, setup.labelled, setup.precision, setup.quantize, place.kind, place.memory, process.figures(),
        str(setup.parallel),
        __version__, torch.__version__, transformers.__version__, _newest(),
    ]  # fmt: skip
    return home() / "plans" / f"{digest(parts)[:32]}.json"


def _newest() -> int:
    """When a file of the package changed last."""
    return max(file.stat().st_mtime_ns for file in Path(__file__).parents[1].rglob("*.py"))
