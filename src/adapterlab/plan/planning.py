"""From a model's name and a method to a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab.core.method import Method
from adapterlab.errors import AdapterlabError, ConfigError, nearest
from adapterlab.foreign.model import text_config
from adapterlab.models.loading import PRECISIONS, QUANTIZATIONS
from adapterlab.plan import process
from adapterlab.plan.child import called, each
from adapterlab.plan.child import processes as child_processes
from adapterlab.plan.device import Device
from adapterlab.plan.dividing import BUCKETS, GATHERED, divided
from adapterlab.plan.extrapolate import extrapolated
from adapterlab.plan.parallel import PLACED, SPLIT, Link, Parallel
from adapterlab.plan.result import Plan
from adapterlab.plan.setup import Setup
from adapterlab.plan.shapes import config_of
from adapterlab.plan.simulate import ACTIVATIONS, ADAPTER, BACKWARD, STATE, Trace, simulate
from adapterlab.plan.tracker import KERNELS
from adapterlab.registry import ids
from adapterlab.registry import method as method_class
from adapterlab.train.config import TrainConfig, Training

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOKENS = 1 << 26  # of a step; their numbers are real in a simulation
USUAL = TrainConfig.model_fields["method"].get_default(call_default_factory=True)["name"]


def plan(
    model: str | Path | PretrainedConfig,
    method: str | Method | Mapping[str, Any] = USUAL,
    *,
    batch: int = 1,
    length: int = 1024,
    precision: str = "bf16",
    quantize: str | None = None,
    recompute: str = "none",
    device: str | Device | None = None,
    speed: float | None = None,
    labelled: float = 1.0,
    training: Training | None = None,
    exact: bool = False,
    trust_remote_code: bool = False,
    devices: int | None = None,
    parallel: str | None = None,
    link: str | Link | None = None,
) -> Plan:
    """Say what training needs, without weights and without the device.

    Args:
        model: a known shape ("qwen2.5-7b"; `shapes()` lists them), a local folder, a hub id or a configuration.
        method: id, id and settings as in a configuration file (`{"name": "lora", "r": 8}`), or a method.
        batch: rows computed at once, on each device.
        length: tokens of a row, padding included.
        precision: of the frozen weights: bf16, fp32 or fp16.
        quantize: None, "nf4" or "int8"; a method that asks for packed weights gets them.
        recompute: none, cheap or full.
        device: cpu, cuda:24GB, rtx4090, ...; None is the fastest one of this machine.
        speed: operations a second that the device reaches in training.
        labelled: share of the tokens that bear a label.
        training: the other settings of a run.
        exact: simulate all layers instead of a few.
        trust_remote_code: run the code that the model brings.
        devices: how many, all alike; the plan is of one of them, or with device_map of all.
        parallel: how a step is divided among them: ddp, fsdp, zero2, zero3 or device_map; see `dividing`.
        link: between them: nvlink, pcie4, 100gbe, ..., or 10^9 bytes a second and direction.

    Raises:
        ModelError: the model is unknown.
        ConfigError: a number or name is out of range, the method needs data to be planned, or model and method cannot
            be divided in this way.
        AttachError: the method cannot work on this model.
    """
    place = device if isinstance(device, Device) else Device.parse(device, speed)
    setup = setup_of(
        model, method, batch=batch, length=length, precision=precision, quantize=quantize, recompute=recompute,
        labelled=labelled, training=training, kind=place.kind, trust_remote_code=trust_remote_code, devices=devices,
        parallel=parallel, link=link,
    )  # fmt: skip
    return described(_name(model), setup, trace_of(setup, None if exact else 3), place)


def near(start: Plan, model: Any, method: Any = USUAL, *, exact: bool = False, **options: Any) -> Plan:
    """Plan what is like a known plan but for some numbers: layers that are alike there are alike here.

    Args:
        start: the known plan, on the same device.
        model: as for `plan`.
        method: as for `plan`.
        exact: as for `plan`.
        options: of `plan`, without a device.
    """
    setup = setup_of(model, method, **{**options, "kind": start.device.kind})
    depths = None if exact else 2 if start.simulated < len(start.layers) else 3
    return described(_name(model), setup, trace_of(setup, depths), start.device)


def setup_of(
    model: str | Path | PretrainedConfig,
    method: str | Method | Mapping[str, Any],
    *,
    batch: int,
    length: int,
    precision: str = "bf16",
    quantize: str | None = None,
    recompute: str = "none",
    labelled: float = 1.0,
    training: Training | None = None,
    kind: str = "cpu",
    trust_remote_code: bool = False,
    devices: int | None = None,
    parallel: str | None = None,
    link: str | Link | None = None,
) -> Setup:
    """Check the arguments of `plan` and put them together."""
    made = make_method(method)
    quantize = quantize or _asks_for(made)
    _check(batch, length, precision, quantize, labelled)
    division = Parallel.parse(devices, parallel, link)
    if division:
        _check_divisible(division, quantize)
    kept = (training or Training()).model_dump(exclude={"epochs", "trackers", "batch_size", "recompute"})
    kept["packing"] = bool(kept.get("packing"))  # rows of one length: a choice that would be tried costs time alone
    step = Training(**{**kept, "batch_size": batch, "recompute": recompute})  # in a run in which schedules have room
    return Setup(
        config_of(model, trust_remote_code=trust_remote_code), made, step, batch, length, labelled, precision,
        quantize, kind, trust_remote_code, division,
    )  # fmt: skip


def plan_config(config: TrainConfig, *, device: str | Device | None = None, **changes: Any) -> Plan:
    """Plan the run of a configuration file; its rows count as long as `data.max_length` allows.

    Args:
        config: of the run.
        device: instead of the configuration's.
        changes: further arguments of `plan`.
    """
    given = {**arguments(config, changes.get("devices")), "device": device or place_of(config), **changes}
    return plan(config.model, given.pop("method"), **given)


def place_of(config: TrainConfig, processes: int = 1) -> Device:
    """Return what a process of a run has on this machine, if so many of its processes are here.

    Raises:
        ConfigError: it is not there, or its memory is not known.
    """
    if config.parallel == PLACED:
        return Device.everything()
    place = Device.parse(config.device)
    return place.shared(processes) if place.kind == "cpu" and processes > 1 else place


def arguments(config: TrainConfig, devices: int | None = None) -> dict[str, Any]:
    """Return what a configuration file says of the arguments of `plan`.

    Args:
        config: of the run.
        devices: processes that train it, or devices that one places its model over; None: one process, which has all
            devices of this machine where it places the model over them. A file that says `auto` means ddp.
    """
    training = config.training
    if devices is None:
        devices = place_of(config).count if config.parallel == PLACED else 1
    kind = "ddp" if config.parallel == "auto" else config.parallel
    across = {"devices": devices, "parallel": kind} if devices > 1 else {}
    return {
        **across,
        "method": config.make_method(),
        "batch": training.batch_size,
        "length": config.data.max_length,
        "precision": config.precision,
        "quantize": config.quantize,
        "recompute": training.recompute,
        "training": training,
        "trust_remote_code": config.trust_remote_code,
    }


def plan_all(
    model: str | Path | PretrainedConfig,
    *,
    methods: list[str] | None = None,
    processes: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> tuple[list[Plan], dict[str, str]]:
    """Plan every method for one model and device, in child processes: one that dies costs one row.

    Args:
        model: as for `plan`.
        methods: ids; all by default.
        processes: at once; None is one for two cores, and two at least.
        progress: told (what, done, total).
        options: of `plan`.

    Returns:
        The plans, the least memory first, and why the other methods have none.
    """
    chosen = methods if methods is not None else ids()
    config = config_of(model, trust_remote_code=options.get("trust_remote_code", False))
    place = options.pop("device", None)
    place = place if isinstance(place, Device) else Device.parse(place, options.pop("speed", None))
    reasons: dict[str, str] = {}
    jobs: dict[str, Any] = {}
    for id in chosen:
        try:
            jobs[id] = (plan, (config, make_method(id)), {**options, "device": place})
        except AdapterlabError as error:  # a method that has no settings by default
            reasons[id] = str(error)
    failed = len(reasons)

    def done(_: str, count: int) -> None:
        if progress:
            progress("planning", failed + count, len(chosen))

    if progress:
        progress("planning", failed, len(chosen))
    found, errors = each(jobs, processes or child_processes(), done)
    reasons |= {id: str(error) for id, error in errors.items()}
    plans = [_renamed(one, _name(model)) for one in found.values()]
    return sorted(plans, key=lambda one: (one.process, one.method)), reasons


def make_method(method: str | Method | Mapping[str, Any]) -> Method:
    """Make a method from what `plan` takes."""
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        return method_class(method)()
    fields = dict(method)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"A method needs a name, such as {{name: lora, r: 8}}; received {dict(method)!r}.")
    return method_class(name)(**fields)


def trace_of(setup: Setup, depths: int | None = 3) -> Trace:
    """Simulate a step, in the child process of an `apart()` around; errors of what cannot be simulated say so.

    Args:
        setup: what to train.
        depths: number of small depths to simulate, see `extrapolated`; None: simulate all layers.

    Raises:
        ConfigError: the method looks at computed numbers, or the child died.
    """
    found: Trace = called(_traced, setup, depths)
    return found


def _traced(setup: Setup, depths: int | None) -> Trace:
    import torch

    from adapterlab.foreign.private_torch import DataDependentOutputException, DynamicOutputShapeException

    try:
        return simulate(setup) if depths is None else extrapolated(setup, simulate, depths)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise _needs_numbers(setup, str(error.func)) from error
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        if isinstance(error, (AdapterlabError, torch.OutOfMemoryError)):
            raise
        raise _needs_numbers(setup, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error


def _needs_numbers(setup: Setup, what: str) -> ConfigError:
    return ConfigError(
        f"{setup.method.id} on {type(setup.config).__name__} cannot be planned: it computes with numbers that exist in "
        f"a real run alone ({what}). Measure a short run instead: adapterlab train --dry-run."
    )


def _check(batch: int, length: int, precision: str, quantize: str | None, labelled: float) -> None:
    for what, value, least in (("batch", batch, 1), ("length", length, 8)):
        if value < least:
            raise ConfigError(f"{what}={value} is too small: it must be at least {least}.")
    if batch * length > TOKENS:
        raise ConfigError(
            f"batch={batch:,} x length={length:,} are more tokens than a step can have anywhere: a plan goes up to "
            f"{TOKENS:,}. Lower one of them, and count accumulated batches apart."
        )
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r} is unknown. {nearest(precision, PRECISIONS)}")
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ConfigError(f"quantize={quantize!r} is unknown. {nearest(quantize, QUANTIZATIONS)}")
    if not 0 < labelled <= 1:
        raise ConfigError(f"labelled={labelled} is no share of tokens: it lies above 0 and is at most 1.")


def _check_divisible(division: Parallel, quantize: str | None) -> None:
    if division.kind in SPLIT and quantize:
        raise ConfigError(
            f"parallel={division.kind!r} deals out weights, and quantize={quantize!r} packs them in blocks that are "
            f"not dealt out here. Use one of ddp, {PLACED}, which hold them whole, or leave quantize out."
        )


def _asks_for(method: Method) -> str | None:
    """How a method wants its base packed, if it says so in a setting `base`."""
    base = getattr(method, "base", None)
    return base if base in QUANTIZATIONS else None


def described(name: str, setup: Setup, trace: Trace, place: Device) -> Plan:
    """Put a trace of one device into words and bytes, divided as the setup asks."""
    division, traffic = setup.parallel, None
    if division and division.kind == PLACED:
        place = place if place.count > 1 else place.times(division.devices)
    elif division:
        trace, traffic = divided(trace, division, setup.training.accumulation)
    peak = trace.peak
    moment = next(window for window, found in trace.moments.items() if found is peak)
    estimate = process.estimate(setup, trace, place)
    parts, layers = _tidy(peak.parts, trace.layers)
    return Plan(
        model=name,
        method=setup.method.id,
        settings=setup.method.model_dump(mode="json", exclude_unset=True),
        device=place,
        batch=setup.batch,
        length=setup.length,
        precision=setup.precision,
        quantize=setup.quantize,
        recompute=setup.training.recompute,
        peak=peak.total,
        moment=moment,
        process=estimate,
        band=process.band(place),
        parts=parts,
        layers=layers,
        trainable=trace.trainable,
        base=trace.base,
        adapter=trace.resting.get(ADAPTER, 0),
        state=trace.resting.get(STATE, 0),
        flops=trace.flops,
        seconds=trace.flops / place.speed if place.speed else None,
        limit=place.memory,
        loss=trace.loss,
        notes=list(_notes(setup)),
        simulated=trace.simulated,
        devices=division.devices if division else 1,
        parallel=division.kind if division else None,
        traffic=traffic,
    )


def _tidy(parts: Mapping[str, int], count: int) -> tuple[dict[str, int], list[int]]:
    """Put the activations of all layers together, and keep them by layer beside."""
    prefix = f"{ACTIVATIONS}, layer "
    layers = [parts.get(f"{prefix}{i}", 0) for i in range(count)]
    kept = {key: size for key, size in parts.items() if not key.startswith(prefix) and size}
    work = {key: kept.pop(key) for key in (GATHERED, BUCKETS, BACKWARD, KERNELS) if key in kept}
    return {**kept, ACTIVATIONS: sum(layers), **work}, layers


def _notes(setup: Setup) -> Iterator[str]:
    longest = getattr(text_config(setup), "max_position_embeddings", None)
    if longest and setup.length > longest:
        yield f"The model was made for {longest:,} positions; rows of {setup.length:,} tokens go beyond."
    if type(setup.method).capabilities()["needs_data"]:
        yield "The method looks at data before training; what that needs is not part of the plan."
    if setup.parallel and setup.parallel.kind == PLACED:
        yield (
            "Layers fill one device after another, so that one may be full while others have room. What has no room "
            "on them waits in the CPU's memory and is fetched for every pass."
        )


def _name(model: str | Path | PretrainedConfig) -> str:
    return str(model) if isinstance(model, (str, Path)) else getattr(model, "name_or_path", "") or type(model).__name__


def _renamed(found: Plan, name: str) -> Plan:
    import dataclasses

    return dataclasses.replace(found, model=name)
