"""`adapterlab combine`."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterlab.cli._conversion import (
    Output,
    Overwrite,
    Rank,
    adapter_place,
    check_adapter_output,
    check_same_base,
    open_adapters,
    save_made,
    show_conversion,
)
from adapterlab.cli._shared import AsJson, BaseModel, Checkpoint, Device, Precision, Trust, bars
from adapterlab.errors import ConfigError


def combine(
    adapters: Annotated[list[str], typer.Argument(help="Run folders or adapter folders.", show_default=False)],
    output: Output,
    weights: Annotated[
        str | None,
        typer.Option(help="One number for each, such as 0.7,0.3; default: equal shares."),
    ] = None,
    how: Annotated[
        str, typer.Option(help="linear, cat, svd, ties, dare_linear, dare_ties or magnitude_prune.")
    ] = "linear",
    rank: Rank = None,
    density: Annotated[
        float | None, typer.Option(help="Share of entries that ties, dare and magnitude_prune keep; default 0.5.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of what dare drops.")] = 0,
    checkpoint: Checkpoint = "best",
    model: BaseModel = None,
    device: Device = None,
    precision: Precision = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Make one adapter of several of any linear methods, and say how exact it is.

    It is a LoRA; of adapters that own entries of the base, one that owns the union of them.
    """
    chosen = _numbers(weights)
    places = [adapter_place(target, model, checkpoint, trust_remote_code) for target in adapters]
    check_adapter_output(output, overwrite, [folder for place in places for folder in place.folders])
    check_same_base(places)
    host, names = open_adapters(places, device, precision)

    from adapterlab.convert import combine as make

    with bars() as progress:
        made = make(
            host,
            names,
            chosen,
            how,  # type: ignore[arg-type]
            rank=rank,
            density=density,
            seed=seed,
            into="combined" if "combined" not in names else "combined_all",
            progress=progress,
        )
    shares = chosen or [1 / len(names)] * len(names)
    origin = " + ".join(f"{weight:g} × {name}" for weight, name in zip(shares, names, strict=True)) + f" ({how})"
    save_made(host, made, output, overwrite, origin)
    show_conversion(made, output, as_json)


def _numbers(text: str | None) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text is not None else None
    except ValueError:
        raise ConfigError(f"--weights takes numbers with commas between, such as 0.7,0.3; received {text!r}.") from None
