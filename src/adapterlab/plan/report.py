"""Plans for people: tables and bars in a terminal, a PNG, an HTML page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from adapterlab.errors import ConfigError, require
from adapterlab.io.atomic import check_made_here, new_file, write_text
from adapterlab.paths import user_path
from adapterlab.plan.parallel import PLACED
from adapterlab.plan.result import Plan

if TYPE_CHECKING:
    from adapterlab.plan.advice import Change
    from adapterlab.plan.joint import Joint
    from adapterlab.plan.serving import Serving

_WIDTH = 60
_BYTES = {" GiB": 2.0**30, " MiB": 2.0**20, " KiB": 2.0**10, " B": 1.0}
_NUMBERS = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
_COLOURS = (
    "blue",
    "magenta",
    "red",
    "yellow",
    "green",
    "cyan",
    "bright_blue",
    "bright_magenta",
    "white",
    "bright_black",
)
_WEB = ("#4269d0", "#a463f2", "#ff725c", "#efb118", "#3ca951", "#6cc5b0", "#97bbf5", "#ff8ab7", "#9c6b4e", "#9498a0")
_VERDICTS = {"fits": "green", "tight": "yellow", "does not fit": "red", "unknown": "dim"}
OVERHEAD = "libraries, allocator, kernels"


def size(count: float) -> str:
    """Write a number of bytes for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count:.0f} B"


def _short(count: float, units: Mapping[str, float]) -> str:
    """Write a number with three digits."""
    unit, factor = next(((u, f) for u, f in units.items() if abs(count) >= f), ("", 1.0))
    value = count / factor
    return f"{value:.{0 if value >= 100 or not unit.strip() else 1 if value >= 10 else 2}f}{unit}"


def work(flops: float) -> str:
    """Write a number of operations for people."""
    for unit, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if flops >= factor:
            return f"{flops / factor:,.2f} {unit}FLOP"
    return f"{flops:,.0f} FLOP"


def shares(plan: Plan) -> dict[str, int]:
    """Return all bytes of the process by what they are for."""
    return {**plan.parts, OVERHEAD: max(0, plan.process - plan.peak)}


def show(plan: Plan) -> Group:
    """Show a plan: what is planned, a bar, its parts, and what follows from them."""
    head = Table("what", "is", title="Plan", title_justify="left", show_header=False)
    for what, value in _facts(plan).items():
        head.add_row(what, Text(value))
    for what, value in _across(plan).items():
        head.add_row(what, Text(value))
    head.add_row("verdict", Text(_verdict(plan), style=_VERDICTS[plan.verdict]))
    parts = Table("part", "bytes", "share", title="At the peak", title_justify="left")
    for (part, count), colour in zip(shares(plan).items(), _colours(_COLOURS), strict=False):
        parts.add_row(Text(f"■ {part}", style=colour), size(count), f"{100 * count / max(1, plan.process):.1f} %")
    return Group(head, _bar(plan), parts, *[Text(f"Note: {note}") for note in plan.notes])


def _facts(plan: Plan) -> dict[str, str]:
    packed = f", {plan.quantize}" if plan.quantize else ""
    median, worst = plan.band
    facts = {
        "run": f"{plan.method} on {plan.model} ({plan.precision}{packed}), {plan.batch} x {plan.length:,} tokens, "
        f"recompute {plan.recompute}",
        "trainable": f"{plan.trainable:,}",
        "live tensors": f"{size(plan.peak)} at the peak: {plan.moment}",
        "whole process" if plan.device.kind == "cpu" else "device memory": f"{size(plan.process)} "
        f"(± {100 * median:.0f} %, at worst {100 * worst:.0f} %)",
        "activations": f"{size(sum(plan.layers))} in {len(plan.layers)} layers, up to {size(max(plan.layers))} each",
        "work": f"{work(plan.flops)} a step",
    }
    if plan.seconds is not None and plan.device.speed:
        facts["time"] = f"about {plan.seconds:.2f} s a step at {plan.device.speed / 1e12:.2f} TFLOP/s"
    return facts


def _across(plan: Plan) -> dict[str, str]:
    """What there is to say of several devices."""
    if plan.parallel == PLACED:
        return {"devices": f"{plan.devices}, {PLACED}; one process, and all figures are of all of them together"}
    if plan.traffic is None:
        return {}
    traffic = plan.traffic
    sent = f"{size(traffic.sent)} a step: weights {size(traffic.gathered)}, gradients {size(traffic.reduced)}"
    found = {
        "devices": f"{plan.devices}, {plan.parallel}; all figures are of one, with {plan.batch} "
        f"{'row' if plan.batch == 1 else 'rows'} of its own: {plan.batch * plan.devices:,} a batch",
        "each sends": sent,
    }
    if traffic.seconds is not None:
        waited = traffic.seconds * traffic.waited / traffic.sent if traffic.sent else 0.0
        found["on the link"] = (
            f"{traffic.seconds:.3g} s at the best rate of {traffic.link}, {waited:.3g} s of it after the backward pass"
        )
    return found


def _verdict(plan: Plan) -> str:
    if plan.limit is None:
        return "the device's memory is not known"
    across = f", {plan.parallel} over {plan.devices}" if plan.parallel else ""
    return f"{plan.verdict}: {size(plan.process)} of {size(plan.limit)} on {plan.device}{across}"


def _colours(palette: Sequence[str]) -> list[str]:
    return list(palette) * 3


def _bar(plan: Plan) -> Text:
    """One line of blocks; a mark where the device ends, if it ends inside."""
    whole = max(plan.process, plan.limit or 0, 1)
    bar, filled = Text(), 0.0
    for count, colour in zip(shares(plan).values(), _colours(_COLOURS), strict=False):
        begin, filled = round(filled), filled + _WIDTH * count / whole
        bar.append("█" * (round(filled) - begin), style=colour)
    bar.append("·" * (_WIDTH - round(filled)), style="dim")
    if plan.limit is not None and plan.limit < plan.process:
        at = int(_WIDTH * plan.limit / whole)
        bar = bar[:at] + Text("|", style="bold red") + bar[at + 1 :]
    return bar


def changes_table(changes: Sequence[Change]) -> Group:
    """Show what each change saves, and below what cannot be tried, and why."""
    table = Table("change", "needs", "saves", "work", "verdict", title="What to change", title_justify="left")
    for change in changes:
        if change.plan is not None:
            verdict = Text(change.plan.verdict, style=_VERDICTS[change.plan.verdict])
            table.add_row(
                Text(change.what), size(change.plan.process), size(change.saving), f"x {change.slower:.2f}", verdict
            )
    why = [Text(f"{change.what}: {change.reason}", style="dim") for change in changes if change.plan is None]
    return Group(*([table] if table.row_count else []), *why)


def methods_table(plans: Sequence[Plan], reasons: Mapping[str, str]) -> Group:
    """Show all methods, the least memory first."""
    table = Table(title="All methods", title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in ("trains", "adapter", "optim.", "live", "needs", "FLOP"):  # fits into 80 columns
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for plan in plans:
        verdict = Text(plan.verdict, style=_VERDICTS[plan.verdict])
        sizes = (_short(count, _BYTES) for count in (plan.adapter, plan.state, plan.peak, plan.process))
        table.add_row(
            Text(plan.method), _short(plan.trainable, _NUMBERS), *sizes, _short(plan.flops, _NUMBERS), verdict
        )
    why = [Text(f"{id}: {reason.splitlines()[0]}", style="dim") for id, reason in reasons.items()]
    return Group(table, *why)


def together_table(joint: Joint, labels: Sequence[str]) -> Group:
    """Show what runs on one base need together."""
    table = Table("run", "method", "tokens", "needs", "begins", title="Together", title_justify="left")
    for plan, need, now, label in zip(joint.plans, joint.needs, joint.at_once, labels, strict=True):
        when = Text("at once" if now else "when there is room", style="" if now else "yellow")
        table.add_row(Text(label), Text(plan.method), f"{plan.batch} x {plan.length:,}", size(need), when)
    separate = sum(plan.process for plan in joint.plans)
    limit = "" if joint.limit is None else f" of {size(joint.limit)}"
    said = Text(f"{joint.verdict}: {size(joint.process)}{limit}", style=_VERDICTS[joint.verdict])
    return Group(
        table,
        Text(f"Base and libraries, once: {size(joint.base)}. As processes of their own: {size(separate)}."),
        Text("All at once: ") + said,
    )


def serving_table(found: Serving) -> Group:
    """Show what serving needs."""
    table = Table("what", "bytes", title="Serving", title_justify="left")
    table.add_row("base weights", size(found.base))
    if found.copies:
        table.add_row("copies in the order that the processor reads, at most", size(found.copies))
    table.add_row(
        f"keys and values, {found.sequences} x {found.length:,} tokens ({size(found.cache)} each)",
        size(found.cache * found.sequences),
    )
    each = f"{size(found.adapter_each)} each" + (f", {found.front} pages in front" if found.front else "")
    table.add_row(f"loaded adapters, {found.adapters} ({each})", size(found.adapter_each * found.adapters))
    table.add_row("a step's work", size(found.work))
    table.add_row("total", size(found.total), style="bold")
    if found.limit is not None:
        table.add_row("of", size(found.limit))
        table.add_row("most sequences beside these adapters", f"{found.most_sequences:,}")
        if found.most_adapters is not None:
            table.add_row("most loaded adapters beside these sequences", f"{found.most_adapters:,}")
    budget = f"The engine's budget for this: engine.memory_gb={found.memory_gb:.3g}, in pages of {size(found.page)}."
    return Group(table, Text(f"{budget} Adapters that are registered and not loaded take no memory."))


# ---------------------------------------------------------------------- files


def save(plans: Sequence[Plan], file: str | Path) -> Path:
    """Draw plans as stacked bars into a PNG or an HTML page, by the name's ending.

    Raises:
        ConfigError: the ending is another.
        OutputError: it cannot be written, or would replace a file that is not from here.
        MissingDependencyError: matplotlib is not installed (PNG only).
    """
    path = user_path(file)
    if path.suffix not in (".png", ".html"):
        raise ConfigError(f"A picture is written as .png or .html; received {str(file)!r}. Change the ending.")
    check_made_here(path)
    if path.suffix == ".png":
        return _png(plans, path)
    write_text(path, _page(plans))
    return path


def _names(plans: Sequence[Plan]) -> list[str]:
    return list(dict.fromkeys(part for plan in plans for part in shares(plan)))


def _png(plans: Sequence[Plan], path: Path) -> Path:
    require("matplotlib", "reports", "to draw a picture")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + 0.45 * len(plans)), layout="constrained")
    axes: Any = figure.subplots()
    labels = [_label(plan) for plan in plans]
    left = [0.0] * len(plans)
    for part, colour in zip(_names(plans), _colours(_WEB), strict=False):
        widths = [shares(plan).get(part, 0) / 2**30 for plan in plans]
        axes.barh(labels, widths, left=left, label=part, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    limit = plans[0].limit if plans else None
    if limit is not None and limit / 2**30 < 3 * max(left, default=1):
        axes.axvline(limit / 2**30, color="red", linestyle="--", label="device")
    axes.set(xlabel="GiB", title="Memory at the peak")
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    with new_file(path) as stream:
        figure.savefig(stream, dpi=120, format="png", metadata={"Software": "adapterlab"})
    return path


def _label(plan: Plan) -> str:
    across = f", {plan.parallel} over {plan.devices}" if plan.parallel else ""
    return f"{plan.method}, {plan.batch} x {plan.length}{across}"


def _page(plans: Sequence[Plan]) -> str:
    """A page that needs nothing else."""
    colours = dict(zip(_names(plans), _colours(_WEB), strict=False))
    whole = max([plan.process for plan in plans] + [1])
    rows = []
    for plan in plans:
        blocks = "".join(
            f'<i title="{html.escape(part)}: {size(count)}" '
            f'style="width:{100 * count / whole:.3f}%;background:{colours[part]}"></i>'
            for part, count in shares(plan).items()
        )
        title = html.escape(f"{_label(plan)}: {size(plan.process)}, {plan.verdict}")
        rows.append(f'<p>{title}</p><div class="bar">{blocks}</div>')
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(part)}</span>' for part, colour in colours.items()
    )
    model = html.escape(plans[0].model) if plans else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="generator" content="adapterlab">'
        f"<title>Plan of {model}</title><style>"
        "body{font:15px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}p{margin:1em 0 .2em}"
        ".bar{display:flex;height:1.6em;background:#eee}.bar i{display:block}"
        ".legend span{margin-right:1.2em;white-space:nowrap}.legend i{display:inline-block;width:.9em;height:.9em;"
        f"margin-right:.3em}}</style><h1>Memory of {model}</h1>{''.join(rows)}"
        f'<p class="legend">{legend}</p></html>\n'
    )
