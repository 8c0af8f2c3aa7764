"""`adapterlab targets`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterlab.cli._shared import AsJson, Trust, print_json
from adapterlab.errors import ModelError
from adapterlab.paths import user_path

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

    from adapterlab.core.site import Site


def targets(
    model: Annotated[str, typer.Argument(help="A model, or a run or adapter folder.", show_default=False)],
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show what can be adapted in a model: every module with its role, kind, shape and parameters.

    Only the model's configuration is read; no weights are loaded.
    """
    from adapterlab.evaluate.opening import locate
    from adapterlab.hosts import Host

    base = locate(model).base
    net = _skeleton(base, trust_remote_code)
    sites = [site for site in Host(net).all_sites() if site.path and _size(site)]
    total = sum(p.numel() for p in net.parameters())
    if as_json:
        print_json({"model": base, "class": type(net).__name__, **_report(sites, total)})
    else:
        _show(base, type(net).__name__, sites, total)


def _skeleton(name: str, trusted: bool) -> Any:
    """The model without weights, from its configuration."""
    import torch

    from adapterlab.foreign.pretrained import build, read_config

    where = _where_config_is(name)
    try:
        config = read_config(where, trust_remote_code=trusted)
        with torch.device("meta"):
            return build(config, trust_remote_code=trusted)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(
            f"The configuration of {name!r} cannot be used: {error}. Give a language model by local folder, hub id or "
            "alias; list the aliases with: adapterlab models."
        ) from None


def _where_config_is(name: str) -> str:
    """A folder, or a repository of the hub, of which only the configuration will be fetched."""
    from adapterlab.models import catalogue, resolve
    from adapterlab.models.source import Hub

    folder, entry = user_path(name), catalogue().get(name)
    if entry is not None:
        where = entry.where()
        return str(where or (entry.source.repo if isinstance(entry.source, Hub) else resolve(name)))
    if (folder / "config.json").is_file() or (not folder.exists() and name.count("/") == 1 and name[0] not in "./~"):
        return str(folder) if folder.exists() else name
    return str(resolve(name))


def _size(site: Site) -> int:
    return sum(p.numel() for p in site.module.parameters())


def _matrix(site: Site) -> tuple[int, int] | None:
    return site.shape if site.kind in ("linear", "embedding") else None


def _roles(sites: Iterable[Site]) -> dict[str, dict[str, Any]]:
    """Modules, parameters and shapes of each role, in model order."""
    found: dict[str, dict[str, Any]] = {}
    for site in sites:
        shape = _matrix(site)
        if site.role and shape:
            entry = found.setdefault(site.role, {"modules": 0, "parameters": 0, "shapes": []})
            entry["modules"] += 1
            entry["parameters"] += _size(site)
            if list(shape) not in entry["shapes"]:
                entry["shapes"].append(list(shape))
    return found


def _all_linear(sites: Sequence[Site]) -> list[Site]:
    from adapterlab.core.targets import ALL_LINEAR, matcher

    return [site for site in sites if matcher(ALL_LINEAR)(site)]


def _report(sites: Sequence[Site], total: int) -> dict[str, Any]:
    linear = _all_linear(sites)
    modules = [
        {
            "path": site.path,
            "kind": site.kind,
            "role": site.role,
            "layer": site.layer,
            "shape": list(shape) if (shape := _matrix(site)) else None,
            "parameters": _size(site),
            "head": site.is_head,
            "tied": site.tied,
        }
        for site in sites
    ]
    all_linear = {"modules": len(linear), "parameters": sum(map(_size, linear))}
    return {"parameters": total, "all-linear": all_linear, "roles": _roles(sites), "modules": modules}


@dataclass
class Node:
    """A module in the tree. Members of a list that differ by number only are equal, and are shown once."""

    path: str = field(compare=False)
    name: str
    text: Text
    parts: list[Node]


def _nodes(sites: Sequence[Site]) -> list[Node]:
    """Nest sites by their paths; lists of modules give way to their members."""
    from torch import nn

    inside: dict[str, list[Site]] = {}
    for site in sites:
        inside.setdefault(site.path.rpartition(".")[0], []).append(site)

    def below(path: str, prefix: str) -> list[Node]:
        nodes = []
        for site in inside.get(path, ()):
            own = site.path.rpartition(".")[2]
            if isinstance(site.module, nn.ModuleList):
                nodes += below(site.path, f"{prefix}{own}.")
            else:
                name = prefix if own.isdigit() else prefix + own
                nodes.append(Node(prefix + own, name, _text(site), below(site.path, "")))
        return nodes

    return below("", "")


def _text(site: Site) -> Text:
    from rich.text import Text

    shape = _matrix(site)
    what = (f"{site.kind} ", (str(list(shape)), "green")) if shape else ((type(site.module).__name__, "dim"),)
    facts = [Text(site.role or "", style="cyan"), Text.assemble(*what), Text(f"{_size(site):,}")]
    return Text("  ").join(fact for fact in [*facts, Text("tied" if site.tied else "")] if fact)


def _grow(tree: Tree, nodes: Sequence[Node]) -> None:
    """Add nodes to a rich tree, equal neighbours as one line."""
    from rich.text import Text

    for run in (list(same) for _, same in groupby(nodes)):
        first, last = run[0], run[-1].path.rpartition(".")[2]
        name = f"{first.path}-{last} ({len(run)}x)" if len(run) > 1 else first.path
        line = Text.assemble((name, "bold"), "  ", first.text, " each" if len(run) > 1 else "")
        _grow(tree.add(line), first.parts)


def _show(base: str, cls: str, sites: Sequence[Site], total: int) -> None:
    from rich.table import Table
    from rich.text import Text
    from rich.tree import Tree

    from adapterlab.terminal import Terminal

    console = Terminal(highlight=False)
    console.print(Text.assemble((base, "bold"), f", {total:,} parameters; shapes are [out, in]"), soft_wrap=True)
    tree = Tree(cls)
    _grow(tree, _nodes(sites))
    console.print(tree)
    table = Table("targets", "modules", "parameters", "shapes [out, in]", title="Entries that `targets` takes")
    for column in table.columns[1:3]:
        column.justify = "right"
    linear = _all_linear(sites)
    table.add_row("all-linear", str(len(linear)), f"{sum(map(_size, linear)):,}", "every linear layer but the head")
    for role, entry in _roles(sites).items():
        shapes = ", ".join(map(str, entry["shapes"][:4])) + (", ..." if len(entry["shapes"]) > 4 else "")
        table.add_row(role, str(entry["modules"]), f"{entry['parameters']:,}", shapes)
    console.print(table)
    console.print("Also: the end of a path (self_attn.q_proj), or a regular expression for whole paths.")
