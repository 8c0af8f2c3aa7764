"""`adapterlab merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterlab.cli._conversion import Adapter, Output, Overwrite, adapter_place
from adapterlab.cli._shared import AsJson, BaseModel, Checkpoint, Device, Trust, print_json, read_lines, settings
from adapterlab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from adapterlab.convert.merging import MergedModel
    from adapterlab.convert.verifying import Verification
    from adapterlab.evaluate.opening import Opened, Place

_CHOICES = {"tied": ("error", "untie"), "quantized": ("error", "dequantize", "requantize")}
_ROWS = 16


def merge(
    adapter: Adapter,
    output: Output,
    samples: Annotated[str | None, typer.Option(help="Text file with one sample a line to compare on.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Compare on evaluation rows instead: a data setting, key=value; repeat for more."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: fp32, bf16 or fp16; default: the run's.")] = None,
    tied: Annotated[str, typer.Option(help="Weights shared with another module: error, or untie.")] = "error",
    quantized: Annotated[
        str, typer.Option(help="Packed base weights: error, dequantize (write plain ones) or requantize.")
    ] = "error",
    checkpoint: Checkpoint = "best",
    model: BaseModel = None,
    device: Device = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base, write a model that transformers loads, and check it against the live one."""
    for option, value in {"tied": tied, "quantized": quantized}.items():
        if value not in _CHOICES[option]:
            raise ConfigError(f"--{option} {value} is unknown. {nearest(value, _CHOICES[option])}")
    if samples and data:
        raise ConfigError("--samples and --data both say what to compare on. Give one of them.")
    lines = read_lines(samples) if samples else None
    from adapterlab.convert.merging import MERGED, merge_into_base
    from adapterlab.evaluate.opening import open_target
    from adapterlab.io.atomic import check_free

    place = adapter_place(adapter, model, checkpoint, trust_remote_code)
    check_free(output, overwrite=overwrite, kind=MERGED, inputs=[*place.folders, samples])
    opened = open_target(place, device=device, precision=dtype)

    from adapterlab.convert.verifying import TEXTS

    assert opened.host is not None
    made = merge_into_base(
        opened.host,
        opened.tokenizer,
        output,
        place.label,
        samples=_rows(settings(data, "--data"), place, opened) if data else lines or TEXTS,
        tied=tied,  # type: ignore[arg-type]
        quantized=quantized,  # type: ignore[arg-type]
        overwrite=overwrite,
    )
    print_json(made.to_dict()) if as_json else _show(made)


def _rows(given: dict[str, Any], place: Place, opened: Opened) -> list[Any]:
    """The first evaluation rows, as the model takes them."""
    from adapterlab.data import load_data
    from adapterlab.evaluate.rows import rows_for
    from adapterlab.evaluate.scoring import _data as data_of

    cfg = data_of(given, place.data)
    return list(rows_for(opened.model, opened.tokenizer, load_data(cfg).eval[:_ROWS], cfg).rows)


def _show(made: MergedModel) -> None:
    from rich.table import Table

    from adapterlab.terminal import Terminal

    console = Terminal(highlight=False)
    found = {"merged": made.verification}
    if made.dequantized is not None:
        found = {"merged, plain": made.dequantized, "merged, packed again": made.verification}
    some = made.verification
    table = Table(title=f"Against the live model, {some.rows} samples, {some.tokens} tokens")
    for column in ("", "logits: max diff.", "mean diff.", "same top token", "perplexity live", "merged"):
        table.add_column(column, justify="right" if column else "left")
    for name, figures in found.items():
        table.add_row(name, *_cells(figures))
    console.print(table)
    console.print(
        f"For scale: the adapter changes the logits by {some.effect:.3g} on average; they vary by {some.spread:.3g}."
    )
    if made.untied:
        console.print("The output layer has got a weight of its own: config.json says tie_word_embeddings=false.")
    console.print(f"Written: {made.folder} ({made.dtype})", soft_wrap=True)


def _cells(found: Verification) -> list[str]:
    perplexities = (found.perplexity_live, found.perplexity_merged)
    return [
        f"{found.max_difference:.3g}",
        f"{found.mean_difference:.3g}",
        f"{found.agreement:.2%}",
        *("-" if value is None else f"{value:,.5g}" for value in perplexities),
    ]
