"""`adapterlab export`."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterlab.cli._conversion import (
    Adapter,
    Energy,
    Output,
    Overwrite,
    Rank,
    adapter_place,
    check_adapter_output,
    open_adapter,
    save_made,
    show_conversion,
)
from adapterlab.cli._shared import AsJson, BaseModel, Checkpoint, Device, Precision, Trust, bars, print_json, say
from adapterlab.errors import ConfigError, nearest

FORMS = ("lora", "peft", "adapterhub")


def export(
    adapter: Adapter,
    output: Output,
    form: Annotated[
        str, typer.Option("--as", help="lora: a plain LoRA adapter. peft, adapterhub: their own two files.")
    ] = "lora",
    rank: Rank = None,
    energy: Energy = None,
    checkpoint: Checkpoint = "best",
    model: BaseModel = None,
    device: Device = None,
    precision: Precision = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter of any linear method as a plain LoRA adapter, or in the format of HF PEFT or AdapterHub."""
    if form not in FORMS:
        raise ConfigError(f"--as {form} is unknown. {nearest(form, FORMS)}")
    if form != "lora" and (rank is not None or energy is not None):
        raise ConfigError(f"--rank and --energy go with --as lora; --as {form} keeps the adapter as it is.")
    place = adapter_place(adapter, model, checkpoint, trust_remote_code)
    check_adapter_output(output, overwrite, place.folders)
    _, host, place = open_adapter(adapter, model, checkpoint, device, precision, trust_remote_code)
    if form != "lora":
        from adapterlab.convert import export_adapterhub, export_peft

        write = export_peft if form == "peft" else export_adapterhub
        write(host, place.label, output, overwrite=overwrite)
        print_json({"folder": str(output)}) if as_json else say(f"Written: {output}")
        return
    from adapterlab.convert import export_lora

    with bars() as progress:
        into = f"{place.label}_lora"
        made = export_lora(host, place.label, rank=rank, energy=energy, into=into, progress=progress)
    save_made(host, made, output, overwrite, f"{place.label} ({host.methods[place.label].id})")
    show_conversion(made, output, as_json)
