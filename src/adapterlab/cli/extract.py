"""`adapterlab extract`."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterlab.cli._conversion import Energy, Output, Overwrite, Rank, check_adapter_output, save_made, show_conversion
from adapterlab.cli._shared import AsJson, Device, Trust, bars


def extract(
    tuned: Annotated[str, typer.Argument(help="The fully tuned model: a folder or a name.", show_default=False)],
    output: Output,
    base: Annotated[str, typer.Option(help="The model it was tuned from.", show_default=False)],
    rank: Rank = None,
    energy: Energy = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep changed embeddings, norms and biases in full; else they are left out.")
    ] = False,
    device: Device = None,
    precision: Annotated[str, typer.Option(help="To compute in: fp32, bf16 or fp16.")] = "fp32",
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Make a LoRA adapter of a fully tuned model, by truncated SVD of what changed; by default 0.9 of the energy."""
    from adapterlab.convert.low_rank import check_size

    check_size(rank, energy)
    check_adapter_output(output, overwrite, [tuned, base])

    from adapterlab.convert import extract_lora
    from adapterlab.hosts import host
    from adapterlab.models import load_model

    before, _ = load_model(base, precision=precision, device=device, trust_remote_code=trust_remote_code)
    after, _ = load_model(tuned, precision=precision, device=device, trust_remote_code=trust_remote_code)
    with bars() as progress:
        made = extract_lora(before, after, rank=rank, energy=energy, keep=keep, into="extracted", progress=progress)
    found = host(before)
    assert found is not None
    save_made(found, made, output, overwrite, f"{tuned} - {base}")
    show_conversion(made, output, as_json)
