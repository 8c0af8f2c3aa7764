"""`adapterlab plan`."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterlab.cli._shared import AsJson, Trust, bars, print_json, say, settings
from adapterlab.errors import ConfigError
from adapterlab.plan.child import prepared
from adapterlab.plan.parallel import PLACED

if TYPE_CHECKING:
    from adapterlab.plan.advice import Outlook
    from adapterlab.plan.result import Plan


def plan(
    configs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[CONFIG]...", help="YAML file of a run; or give --model.", show_default=False),
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Plan the runs of several files on one base, as train --together.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="A known shape (--shapes lists them), a folder with config.json, or a hub id.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Id of a method; default: lora, or the file's.")] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank, for methods that have one.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Another setting of the method: key=value.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows computed at once, on each device.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of the frozen weights: bf16, fp32 or fp16.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Pack the frozen weights: nf4 or int8.")] = None,
    recompute: Annotated[str | None, typer.Option(help="none, cheap or full.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cpu:32GB, cuda:24GB, rtx4090, ...")] = None,
    speed: Annotated[
        float | None, typer.Option(help="10^12 operations a second the device reaches in training.")
    ] = None,
    devices: Annotated[int | None, typer.Option(help="How many, all alike; the plan is of one of them.")] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            help="How a step is divided among them: ddp, fsdp, zero2 or zero3; device_map: one process has all of them."
        ),
    ] = None,
    link: Annotated[
        str | None, typer.Option(help="Between them: nvlink, pcie4, 100gbe, ..., or 10^9 bytes a second.")
    ] = None,
    all_methods: Annotated[bool, typer.Option("--all-methods", help="Plan every method, sorted.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Plan serving instead of training.")] = False,
    sequences: Annotated[int, typer.Option(help="With --serve: sequences at once.")] = 1,
    adapters: Annotated[int, typer.Option(help="With --serve: adapters in memory.")] = 1,
    limits: Annotated[bool, typer.Option(help="Find the largest batch and length, and what to change.")] = True,
    exact: Annotated[bool, typer.Option("--exact", help="Simulate every layer instead of a few.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw it too: a .png or .html file.")] = None,
    shapes: Annotated[bool, typer.Option("--shapes", help="List the known shapes and leave.")] = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Say whether a run will fit: memory by part, work, time, limits, and what to change; nothing is loaded.

    One training step is simulated on tensors without contents, with the library's own code.
    """
    if shapes:
        return _list_shapes(as_json)
    numbers = {
        "batch": batch, "length": length, "precision": precision, "quantize": quantize, "recompute": recompute,
        "devices": devices, "parallel": parallel, "link": link,
    }  # fmt: skip
    options: dict[str, Any] = {key: value for key, value in numbers.items() if value is not None}
    if together:
        others = {"--model": model, "--method": method, "--r": r, "--set": setting, "--serve": serve or None}
        others |= {"--all-methods": all_methods or None, **{f"--{key}": value for key, value in options.items()}}
        _check_files_alone(others)
        return _together(configs or [], device, speed, exact, trust_remote_code, picture, as_json)
    config = _single(configs or [])
    if (config is None) == (model is None):
        raise ConfigError(
            "Give one of a configuration file and --model, such as adapterlab plan --model qwen2.5-1.5b --method lora."
        )
    if serve:
        _check_one_device(options)
    with contextlib.nullcontext() if serve else prepared():
        name, chosen = _subject(config, model, method, r, setting or [], options)
        options["device"] = _device(device or options.pop("device", None), speed)
        if trust_remote_code:
            options["trust_remote_code"] = True
        if serve:
            return _serve(name, chosen, options, sequences, adapters, as_json)
        if exact:
            options["exact"] = True
        if all_methods:
            return _all(name, options, picture, as_json)
        _one(name, chosen, options, limits, picture, as_json)


def _single(configs: list[Path]) -> Path | None:
    """The one file there is, if any."""
    if len(configs) > 1:
        raise ConfigError(
            f"{len(configs)} files were given. Runs on one base are planned with: adapterlab plan "
            f"{' '.join(map(str, configs))} --together. Others are planned one by one."
        )
    return configs[0] if configs else None


def _check_files_alone(others: dict[str, Any]) -> None:
    """Refuse options that would replace what the files of several runs say."""
    given = [name for name, value in others.items() if value]
    if given:
        raise ConfigError(
            f"--together plans the runs of the files as they are, so {', '.join(given)} cannot be given. Write the "
            "settings into the files."
        )


def _together(
    configs: list[Path],
    device: str | None,
    speed: float | None,
    exact: bool,
    trust: bool,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Plan each run, and put the plans together."""
    from adapterlab.plan import together
    from adapterlab.plan.planning import plan_config
    from adapterlab.plan.report import save, together_table
    from adapterlab.terminal import Terminal
    from adapterlab.train.common import check_common
    from adapterlab.train.config import load_config

    found = [load_config(path, ["trust_remote_code=true"] * trust)[0] for path in configs]
    check_common(found)
    place, plans = _device(device or found[0].device, speed), []
    with prepared(), bars() as update:
        for number, config in enumerate(found):
            update("simulating steps", number, len(found))
            plans.append(plan_config(config, device=place, exact=exact))
    joint = together(plans)
    if picture is not None:
        save(plans, picture)
    if as_json:
        return print_json(joint.to_json())
    Terminal(highlight=False).print(together_table(joint, [str(config.output) for config in found]))


def _subject(
    config: Path | None, model: str | None, method: str | None, r: int | None, pairs: list[str], options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The model and the method; what a file says joins the options."""
    from adapterlab.plan.planning import USUAL

    chosen: dict[str, Any] = {"name": method or USUAL}
    if config is not None:
        from adapterlab.plan.before_run import early_plan
        from adapterlab.plan.planning import arguments, place_of
        from adapterlab.train.config import load_config

        found, _ = load_config(config)
        if not {"devices", "parallel"} & options.keys():
            early_plan(found, seconds=60.0)  # kept for `adapterlab train`
        count = options.get("devices")
        whole = found.parallel == PLACED and count is None and "parallel" not in options
        from_file = {**arguments(found, count), "device": place_of(found) if whole else found.device}
        del from_file["method"]
        if found.parallel not in ("auto", PLACED) and count is None and "parallel" not in options:
            say(
                f"{config} says parallel: {found.parallel}, and this is the plan of one process, which has nothing to "
                "share. Add --devices N to plan what each of N has: adapterlab train --processes N.", err=True,
            )  # fmt: skip
        for key, value in from_file.items():
            options.setdefault(key, value)
        model = found.model
        chosen = dict(found.method) if method in (None, found.method["name"]) else chosen
    if r is not None:
        chosen["r"] = r
    return str(model), {**chosen, **settings(pairs, "--set")}


def _check_one_device(options: dict[str, Any]) -> None:
    given = [f"--{name}" for name in ("devices", "parallel", "link") if name in options]
    if given:
        raise ConfigError(
            f"{', '.join(given)} divide a training step, and --serve plans a server, which has one device. Leave them "
            "out; several replicas need as much each."
        )


def _device(device: str | None, speed: float | None) -> Any:
    from adapterlab.plan import Device

    if speed is not None and speed <= 0:
        raise ConfigError(f"--speed={speed:g} is no speed: give 10^12 operations a second, such as --speed 60.")
    return Device.parse(device, speed and speed * 1e12).measured()


def _one(
    model: str, method: dict[str, Any], options: dict[str, Any], limits: bool, picture: Path | None, as_json: bool
) -> None:
    from adapterlab.plan.advice import Outlook, outlook
    from adapterlab.plan.planning import plan as make
    from adapterlab.plan.report import changes_table, save, show
    from adapterlab.terminal import Terminal

    gc.freeze()  # what libraries brought is not looked through whenever a simulation tidies up
    console = Terminal(stderr=as_json, highlight=False)
    with bars() as update:
        update("simulating a step", 0, 1)
        found = make(model, method, **options)
    if not as_json:
        console.print(show(found))
    more = Outlook(None, None, [])
    if limits:
        with bars() as update:  # a dozen simulations
            more = outlook(model, method, base=found, progress=update, **options)
    if picture is not None:
        save([found, *(c.plan for c in more.changes if c.plan is not None)], picture)
    if as_json:
        return print_json(_report(found, more))
    if more.batch is not None:
        console.print(f"Largest batch at {found.length:,} tokens: {more.batch:,}.  Largest length at batch "
                      f"{found.batch}: {more.length:,}.")  # fmt: skip
    if more.changes:
        console.print(changes_table(more.changes))
    if picture is not None:
        console.print(f"Drawn: {picture}")


def _report(found: Plan, more: Outlook) -> dict[str, Any]:
    listed = [
        {
            "what": change.what,
            "saving": change.saving,
            "work": round(change.slower, 3),
            "process": change.plan.process if change.plan else None,
            "reason": change.reason or None,
        }
        for change in more.changes
    ]
    return {**found.to_json(), "largest_batch": more.batch, "largest_length": more.length, "changes": listed}


def _all(model: str, options: dict[str, Any], picture: Path | None, as_json: bool) -> None:
    from adapterlab.plan.planning import plan_all
    from adapterlab.plan.report import methods_table, save
    from adapterlab.terminal import Terminal

    with bars() as update:
        plans, reasons = plan_all(model, progress=update, **options)
    if picture is not None:
        save(plans, picture)
    if as_json:
        return print_json({"plans": [found.to_json() for found in plans], "without": reasons})
    Terminal(highlight=False).print(methods_table(plans, reasons))


def _serve(
    model: str, method: dict[str, Any], options: dict[str, Any], sequences: int, adapters: int, as_json: bool
) -> None:
    from adapterlab.plan.report import serving_table
    from adapterlab.plan.serving import plan_serving
    from adapterlab.terminal import Terminal

    taken = {
        key: options[key]
        for key in ("length", "precision", "quantize", "device", "trust_remote_code")
        if key in options
    }
    found = plan_serving(model, method, sequences=sequences, adapters=adapters, **taken)
    print_json(found.to_json()) if as_json else Terminal(highlight=False).print(serving_table(found))


def _list_shapes(as_json: bool) -> None:
    from adapterlab.plan.shapes import shapes

    print_json(shapes()) if as_json else say("\n".join(sorted(shapes())))
