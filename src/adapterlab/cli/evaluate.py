"""`adapterlab evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterlab.cli._shared import (
    AsJson,
    BaseModel,
    Checkpoint,
    Device,
    Precision,
    Target,
    Trust,
    bars,
    print_json,
    settings,
)

if TYPE_CHECKING:
    from adapterlab.evaluate.result import Evaluation, Figures
    from adapterlab.terminal import Terminal

_SHOWN = 300  # characters of a sample answer
_MARKS: dict[float | None, str | tuple[str, str]] = {1.0: ("✓ ", "green"), 0.0: ("✗ ", "red"), None: ""}  # by score


def evaluate(
    target: Target,
    checkpoint: Checkpoint = "best",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A data setting, key=value; repeat for more. For a run it replaces the run's own. "
            "eval_path=FILE evaluates on all rows of a file."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first n evaluation examples only.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Evaluate the base model too, on the same examples.")] = False,
    model: BaseModel = None,
    batch_size: Annotated[int, typer.Option(help="Examples computed at once.")] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; default: twice the longest reference, at least 64.")
    ] = None,
    samples: Annotated[int, typer.Option(help="How many answers to show.")] = 3,
    output: Annotated[
        Path | None, typer.Option(help="Folder for answers and figures; default: evaluation/ in the run folder.")
    ] = None,
    device: Device = None,
    precision: Precision = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure loss and share of right answers on held-out examples, with 95 % intervals."""
    from adapterlab.evaluate.scoring import score

    with bars() as progress:
        found = score(
            target,
            data=settings(data, "--data") if data else None,
            checkpoint=checkpoint,
            model=model,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            samples=samples,
            base=base,
            output=output,
            device=device,
            precision=precision,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)


def _show(found: Evaluation) -> None:
    from rich.table import Table

    from adapterlab.data.formats import Columns
    from adapterlab.terminal import Terminal

    console = Terminal(highlight=False)
    table = Table("", "loss", "perplexity", "right", "score", "95 % interval", title=f"{found.n} examples")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, figures in {"base": found.base, "evaluated": found}.items():
        if figures is not None:
            table.add_row(name, *_cells(figures))
            for source, part in figures.sources.items():
                table.add_row(f"  {source}", *_cells(part), style="dim")
    console.print(table)
    if found.fixed is not None:
        console.print(f"Against the base: {found.fixed} answers fixed, {found.broken} broken.")
    if found.why_no_score:
        console.print(f"There is no score: {found.why_no_score}.")
    if found.left_out:
        console.print(
            f"{found.left_out} examples leave no room for an answer within data.max_length and were left out, as in "
            "training."
        )
    _show_samples(console, found)
    scorer = f", scored by {found.scorer}" if found.scorer else ""
    console.print(f"{found.target} on {found.source}{scorer}; {found.tokens:,} tokens, {found.seconds:.1f} s.")
    if found.columns.get("used"):
        console.print(f"Columns: {Columns(**found.columns)}.", soft_wrap=True, markup=False)
    if found.answers:
        console.print(f"All answers: {found.answers}", soft_wrap=True)


def _cells(figures: Figures) -> list[str]:
    cells = [f"{figures.loss:.4f}", f"{figures.perplexity:,.4g}"]
    if figures.score is None or figures.interval is None:
        return [*cells, "-", "-", "-"]
    low, high = figures.interval
    return [*cells, f"{figures.correct}/{figures.n}", f"{figures.score:.1%}", f"{low:.1%} - {high:.1%}"]


def _show_samples(console: Terminal, found: Evaluation) -> None:
    from rich.table import Table
    from rich.text import Text

    if not found.samples:
        return
    base = found.base is not None
    table = Table("prompt", "reference", "answer", *["base"] * base, show_lines=True)
    for row in found.samples:
        cells = [Text(str(row[key])[:_SHOWN]) for key in ("prompt", "reference")]
        for key in ["answer", *["base_answer"] * base]:
            cells.append(Text.assemble(_MARKS[row[key.replace("answer", "score")]], row[key][:_SHOWN]))
        table.add_row(*cells)
    console.print(table)
