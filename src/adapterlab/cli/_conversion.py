"""What the verbs that convert adapters have in common: opening several on one base, and showing what was made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterlab.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from adapterlab.convert.building import Conversion
    from adapterlab.convert.entries import United
    from adapterlab.evaluate.opening import Opened, Place
    from adapterlab.hosts import Host

Adapter = Annotated[str, typer.Argument(help="A run folder or an adapter folder.", show_default=False)]
Output = Annotated[Path, typer.Option(help="Folder to write.", show_default=False)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output folder if this command wrote it, or one like it.")
]
Rank = Annotated[int | None, typer.Option(help="Largest rank of each module.")]
Energy = Annotated[
    float | None, typer.Option(help="Instead of a rank: the share of each module's squared norm to keep, such as 0.9.")
]


def adapter_place(target: str, model: str | None, checkpoint: str, trust_remote_code: bool) -> Place:
    """Locate an adapter.

    Raises:
        ConfigError: the name stands for a base model.
    """
    from adapterlab.evaluate.opening import locate

    place = locate(target, model=model, checkpoint=checkpoint, trust_remote_code=trust_remote_code)
    if place.adapter is None:
        raise ConfigError(f"{target!r} is a base model, or is not there. Give a run folder or an adapter folder.")
    return place


def check_adapter_output(output: Path, overwrite: bool, inputs: Sequence[str | Path | None]) -> None:
    """Check before the work that its adapter can be written.

    Raises:
        OutputError: the folder is not free, or is or holds one of the inputs.
    """
    from adapterlab.io.atomic import check_free
    from adapterlab.io.folder import ADAPTER

    check_free(output, overwrite=overwrite, kind=ADAPTER, inputs=inputs)


def check_same_base(places: Sequence[Place]) -> None:
    """Check that adapters belong to one base model.

    Raises:
        FormatError: they name different ones.
    """
    if len({place.base_model for place in places}) > 1:
        listed = "; ".join(f"{place.adapter} for {place.base!r}" for place in places)
        raise FormatError(
            f"The adapters were made for different base models: {listed}. A change of one means nothing in another. "
            "If these are names of the same model, say so with --model NAME."
        )


def open_adapters(places: Sequence[Place], device: str | None, precision: str | None) -> tuple[Host, list[str]]:
    """Load the base and put the adapters on it, switched off; return the host and their names."""
    return open_together(places, device, precision)[1:]


def open_together(places: Sequence[Place], device: str | None, precision: str | None) -> tuple[Any, Host, list[str]]:
    """The same, with the tokenizer before them."""
    from adapterlab.evaluate.opening import open_target
    from adapterlab.hosts import load

    opened = open_target(dataclasses.replace(places[0], adapter=None), device=device, precision=precision)
    names: list[str] = []
    for place in places:
        again = sum(name.partition("__")[0] == place.label for name in names)
        names.append(f"{place.label}__{again + 1}" if again else place.label)
        assert place.adapter is not None
        host = load(opened.model, place.adapter, names[-1], active=False)
    return opened.tokenizer, host, names


def open_adapter(
    target: str,
    model: str | None,
    checkpoint: str,
    device: str | None,
    precision: str | None,
    trust_remote_code: bool,
) -> tuple[Opened, Host, Place]:
    """Load the base with one adapter, live."""
    from adapterlab.evaluate.opening import open_target

    place = adapter_place(target, model, checkpoint, trust_remote_code)
    opened = open_target(place, device=device, precision=precision)
    assert opened.host is not None
    return opened, opened.host, place


def save_made(host: Host, made: Conversion | United, output: Path, overwrite: bool, origin: str) -> None:
    """Save an adapter that was made of others, with what it keeps of them in the card."""
    host.save(output, made.name, overwrite=overwrite, notes={"Made from": origin, **made.notes()})


def show_conversion(made: Conversion | United, output: Path, as_json: bool) -> None:
    """Print ranks and errors of each role's modules, and of the whole; of entries how many there are."""
    from statistics import median

    from adapterlab.cli._shared import by_role, print_json
    from adapterlab.convert.entries import United

    if as_json:
        print_json({**made.to_dict(), "folder": str(output)})
        return
    if isinstance(made, United):
        _show_union(made, output)
        return
    from rich.table import Table

    from adapterlab.terminal import Terminal

    console = Terminal(highlight=False)
    table = Table("modules", "rank", "least energy kept", "relative error", "worst")
    for column in table.columns[1:]:
        column.justify = "right"
    for role, places in by_role([module.path for module in made.modules]).items():
        group = [made.modules[i] for i in places]
        ranks, errors = [module.rank for module in group], [module.error for module in group]
        rank = f"{min(ranks)} - {max(ranks)}" if min(ranks) < max(ranks) else str(ranks[0])
        energy = min(module.energy for module in group)
        table.add_row(role, rank, f"{energy:.4%}", f"{median(errors):.3g}", f"{max(errors):.3g}")
    table.add_row("all", f"sum {sum(made.ranks.values())}", f"{made.energy:.4%}", f"{made.error:.3g}", style="bold")
    console.print(table)
    console.print(f"Worst module: {made.worst.path}, relative error {made.worst.error:.3g}.", soft_wrap=True)
    if made.saved:
        console.print(f"Kept in full: {', '.join(made.saved)}.", soft_wrap=True)
    _show_dropped(console, made)
    console.print(f"Written: {output}", soft_wrap=True)


def _show_union(made: United, output: Path) -> None:
    from adapterlab.terminal import Terminal

    console = Terminal(highlight=False)
    for name, count in made.sources.items():
        console.print(f"{name}: {count:,} entries", soft_wrap=True)
    for pair, share in made.overlap.items():
        console.print(f"{pair}: {share:.2%} of the smaller one's entries are in both", soft_wrap=True)
    console.print(f"{made.name} ({made.method}): {made.entries:,} entries, exact", soft_wrap=True)
    if made.saved:
        console.print(f"Kept in full: {', '.join(made.saved)}.", soft_wrap=True)
    console.print(f"Written: {output}", soft_wrap=True)


def _show_dropped(console: Any, made: Conversion) -> None:
    if made.dropped:
        largest = sorted(made.dropped.items(), key=lambda item: -item[1])
        named = ", ".join(f"{path} ({share:.2%})" for path, share in largest[:6])
        more = f" and {len(largest) - 6} more" if len(largest) > 6 else ""
        console.print(
            f"Left out, as low-rank factors cannot say it (norm relative to the whole change): {named}{more}. "
            "Keep it with --keep.",
            soft_wrap=True,
        )
