"""`adapterlab analyze`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterlab.cli._conversion import Overwrite, check_same_base
from adapterlab.cli._shared import AsJson, Checkpoint, Device, Trust, bars, by_role, print_json
from adapterlab.errors import ConfigError

if TYPE_CHECKING:
    from adapterlab.convert.analysis import Analysis
    from adapterlab.convert.changes import Changes
    from adapterlab.core.usage import Load
    from adapterlab.evaluate.opening import Place


def analyze(
    target: Annotated[str, typer.Argument(help="A run, an adapter, or a tuned model.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The base model; needed for a tuned model.")] = None,
    other: Annotated[
        str | None, typer.Option(help="A second run, adapter or tuned model of the same base, to compare with.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for analysis.json and analysis.png.")] = None,
    rank: Annotated[int, typer.Option(min=1, max=256, help="Show how much of the change this rank would keep.")] = 4,
    picture: Annotated[bool, typer.Option(help="Draw analysis.png too; needs matplotlib.")] = True,
    checkpoint: Checkpoint = "best",
    device: Device = None,
    precision: Annotated[str, typer.Option(help="Of the base weights: fp32, bf16 or fp16.")] = "fp32",
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show what training changed: spectra, ranks, and magnitude against direction, for one or two adapters.

    Of a run whose method routes tokens to experts: the share of the weight that each expert got, module by module.
    """
    from adapterlab.core.usage import described
    from adapterlab.io.atomic import Kind, check_free, new_folder, write_json

    places = _places([target] if other is None else [target, other], base, checkpoint, trust_remote_code)
    kind = Kind("an analysis", ("analysis.json",), ("analysis.json", "analysis.png"))
    if output is not None:
        inputs = [folder for place in places for folder in place.folders]
        check_free(output, overwrite=overwrite, kind=kind, inputs=inputs)
        if picture:
            from adapterlab.convert.picture import check_drawing

            check_drawing()
    names = _names(places)
    used = _used(dict(zip(names, places, strict=True)))
    rest = {name: place for name, place in zip(names, places, strict=True) if name not in used}
    found, cosines = _analyses(rest, device, precision) if rest else ({}, {})
    report: dict[str, Any] = {name: analysis.to_dict() for name, analysis in found.items()}
    report |= {name: {"load": described(history)} for name, history in used.items()}
    if other is not None:
        report = {**report, "cosine": cosines}
    if output is not None:
        with new_folder(output, overwrite=overwrite, kind=kind) as work:
            write_json(work / "analysis.json", report)
            if picture:
                from adapterlab.convert.picture import draw

                loads = {name: list(history.values())[-1] for name, history in used.items()}
                draw(found, work / "analysis.png", rank, loads)
    if as_json:
        print_json(report)
        return
    adapters = [name for name, place in rest.items() if place.adapter is not None]
    _show(found, cosines, output, rank, adapters, used)


def _places(targets: list[str], base: str | None, checkpoint: str, trust_remote_code: bool) -> list[Place]:
    from adapterlab.evaluate.opening import locate

    places = []
    for target in targets:
        place = locate(target, checkpoint=checkpoint, trust_remote_code=trust_remote_code)
        if place.adapter is not None and base is not None:
            place = dataclasses.replace(place, base=base)
        places.append(place)
    base = base or next((p.base for p in places if p.adapter is not None), None)
    if base is None:
        raise ConfigError(f"{targets[0]!r} is a whole model: say with --base which model it was tuned from.")
    check_same_base([p for p in places if p.adapter is not None])
    return [p if p.adapter is not None else dataclasses.replace(p, run=Path(p.base), base=base) for p in places]


def _used(places: dict[str, Place]) -> dict[str, dict[int, Load]]:
    """What the experts were used in runs that have some, step by step."""
    from adapterlab.train.folder import read_load

    found = {name: read_load(p.run) for name, p in places.items() if p.kind == "run" and p.run is not None}
    return {name: history for name, history in found.items() if history}


def _analyses(
    places: dict[str, Place], device: str | None, precision: str
) -> tuple[dict[str, Analysis], dict[str, float]]:
    from adapterlab.convert import analyze as describe
    from adapterlab.convert.analysis import cosine
    from adapterlab.evaluate.opening import open_target
    from adapterlab.hosts import Host, host

    first = dataclasses.replace(next(iter(places.values())), adapter=None)
    model = open_target(first, device=device, precision=precision).model
    changes = [_changes(model, place, name, device, precision) for name, place in places.items()]
    attached = host(model) or Host(model)
    with attached.using(), bars() as progress:
        made = {name: describe(one, progress) for name, one in zip(places, changes, strict=True)}
        return made, cosine(*changes) if len(changes) == 2 else {}


def _changes(model: Any, place: Place, name: str, device: str | None, precision: str) -> Changes:
    from adapterlab.convert import AdapterChanges, ModelChanges
    from adapterlab.hosts import load
    from adapterlab.models import load_model

    if place.adapter is None:
        assert place.run is not None  # the tuned model
        trusted = place.trust_remote_code
        tuned, _ = load_model(place.run, precision=precision, device=device, trust_remote_code=trusted)
        return ModelChanges(model, tuned)
    host = load(model, place.adapter, name, active=False)
    with host.using():
        return AdapterChanges(host, name)


def _names(places: list[Place]) -> list[str]:
    names = [place.label for place in places]
    return [f"{name}_{i + 1}" for i, name in enumerate(names)] if len(set(names)) < len(names) else names


def _show(
    found: dict[str, Analysis],
    cosines: dict[str, float],
    output: Path | None,
    rank: int,
    adapters: list[str],
    used: dict[str, dict[int, Load]],
) -> None:
    from adapterlab.core.usage import collapsed
    from adapterlab.foreign.roles import ranks_by_role
    from adapterlab.terminal import Terminal

    console = Terminal(highlight=False)
    for name, analysis in found.items():
        console.print(_table(name, analysis, cosines, rank))
        most = max(analysis.spectra, key=lambda s: s.relative, default=None)
        if most is not None:
            console.print(f"{name}: largest at {most.path}, {most.relative:.3g} of the weight's norm.", soft_wrap=True)
        if name in adapters:
            ranks = dict.fromkeys(analysis.unchanged, 0) | {s.path: s.rank for s in analysis.spectra}
            for text in ranks_by_role(ranks).values():
                console.print(f"{name}: rank {text}", soft_wrap=True)
        if analysis.correlation is not None:
            roles = ", ".join(f"{role} {r:+.2f}" for role, r in analysis.by_role.items() if r is not None)
            more = f" ({roles})" if roles else ""
            console.print(f"{name}: correlation of ΔM and ΔD {analysis.correlation:+.3f}{more}", soft_wrap=True)
        if analysis.others:
            console.print(f"{name}: {len(analysis.others)} other parameters changed too.", soft_wrap=True)
    for name, history in used.items():
        console.print(_load_table(name, history))
        if said := collapsed(list(history.values())[-1]):
            console.print(f"{name}: {said}", soft_wrap=True)
    where = f"Written: {output}" if output is not None else "Module by module: --json, or --output FOLDER."
    console.print(where, soft_wrap=True)


def _table(name: str, analysis: Analysis, cosines: dict[str, float], rank: int) -> Any:
    """The medians of each role."""
    from statistics import median

    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=f"{name}: medians over the modules of a role", title_justify="left", box=SIMPLE_HEAD)
    columns: dict[str, tuple[str, Any]] = {
        "‖ΔW‖/‖W‖": (".3g", lambda s: s.relative),
        "rank": (".3g", lambda s: s.rank),
        "effective rank": (".2f", lambda s: s.effective_rank),
        "stable rank": (".2f", lambda s: s.stable_rank),
        f"in {rank}": (".0%", lambda s: s.share(rank)),
        "ΔM": (".2g", lambda s: s.magnitude),
        "ΔD": (".2g", lambda s: s.direction),
    }
    if cosines:
        columns["cosine"] = ("+.2f", lambda s: cosines.get(s.path))
    table.add_column("modules", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for role, places in by_role([s.path for s in analysis.spectra]).items():
        cells = []
        for form, read in columns.values():
            values = [value for i in places if (value := read(analysis.spectra[i])) is not None]
            cells.append(format(median(values), form) if values else "-")
        table.add_row(role, *cells)
    return table


def _load_table(name: str, history: dict[int, Load]) -> Any:
    """For each role the shares of experts in its modules, and how many experts that amounts to."""
    from statistics import median

    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from adapterlab.core.usage import even

    steps = list(history.items())
    (first, before), (last, load) = steps[0], steps[-1]
    title = f"{name}: share of the weight that experts got at step {last}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("modules", no_wrap=True)
    for column in ("experts", "least", "median", "most", f"effective: step {first}", f"step {last}"):
        table.add_column(column, justify="right")
    paths = list(load)
    for role, places in by_role(paths).items():
        here = [paths[i] for i in places]
        every = [value for path in here for value in load[path]]
        sizes = sorted({len(load[path]) for path in here})
        effective = [median(even(one[path]) for path in here if path in one) for one in (before, load)]
        cells = [f"{value:.1%}" for value in (min(every), median(every), max(every))]
        table.add_row(
            role, "-".join(map(str, sizes[:: max(1, len(sizes) - 1)])), *cells, *map("{:.2f}".format, effective)
        )
    return table
