"""Several adapters that own entries of the base into one that owns the union of them: a sparse change stays sparse."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adapterlab.convert.blending import SUMS, joined, thinned
from adapterlab.convert.changes import exact
from adapterlab.core.adapter import Copy
from adapterlab.core.method import Method
from adapterlab.engine.sparse import OwnVector, as_saved
from adapterlab.errors import MergeError
from adapterlab.hosts import Host

Sparse = tuple[Tensor, Tensor]  # ascending flat positions `[k]` of a parameter, and what is there `[k]`
Mix = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


@dataclass(frozen=True)
class United:
    """The adapter that was made of others, with the entries that any of them had.

    Attributes:
        name: of the adapter.
        method: id of its method, which is that of one of the others.
        entries: number of its entries.
        sources: number of entries of each of the others.
        overlap: of each two of them the share of the smaller one's entries that the other has too.
        saved: modules that are kept in full, as `modules_to_save`.
    """

    name: str
    method: str
    entries: int
    sources: dict[str, int]
    overlap: dict[str, float]
    saved: tuple[str, ...] = ()

    def notes(self) -> dict[str, str]:
        """Facts for the card of the adapter."""
        counts = ", ".join(f"{count:,}" for count in self.sources.values())
        shares = {f"Overlap of {pair}": f"{share:.2%}" for pair, share in self.overlap.items()}
        return {"Entries": f"{self.entries:,}, made of {counts}", **shares}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def own_entries(host: Host, names: Sequence[str]) -> bool:
    """Say whether all of these adapters consist of entries of the base, and perhaps copies of modules."""
    for name in names:
        patches = [patch for key in host.parts(name) for patch in host.patches[key].values()]
        beside = [a for key in host.parts(name) for a in host.adapters(key).values()]
        if not patches or any(patch.entries is None for patch in patches):
            return False
        if not all(a.resident or isinstance(a, Copy) for a in beside):
            return False
    return True


@torch.no_grad()
def unite(
    host: Host,
    names: Sequence[str],
    weights: Sequence[float],
    how: str,
    density: float,
    generator: torch.Generator,
    into: str,
    progress: Callable[[str, int, int], None] | None,
) -> United | None:
    """Make an adapter that owns the union of the entries of several; see `combine`.

    The changes are taken and combined in float32, and the result is added to the base once.

    Returns:
        What was made; None: none of the methods can hold such entries.

    Raises:
        MergeError: nothing was chosen, or one adapter trains whole what another one has entries of.
        AttachError: the name `into` is taken.
    """

    def thin(change: Tensor) -> Tensor:
        return thinned(change, how, density, generator)

    def mix(changes: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
        return joined(changes, shares, how)

    changes = {name: _changes(host, name) for name in names}
    paths = list(dict.fromkeys(path for found in changes.values() for path in found))
    entries: dict[str, Sparse] = {}
    for done, path in enumerate(paths):
        here = [(w, changes[n][path]) for n, w in zip(names, weights, strict=True) if path in changes[n]]
        index, change = _on_union([(w, (own, thin(found))) for w, (own, found) in here], mix)
        kept = slice(None) if how in SUMS else change != 0
        values = exact(host.model.get_parameter(path)).view(-1)[index] + change
        entries[path] = index[kept], values[kept]
        if progress:
            progress("combining", done + 1, len(paths))
    if not any(len(index) for index, _ in entries.values()):
        raise MergeError(f"{', '.join(names)} have no entries yet: adapters that were never trained change nothing.")
    copies = _copies(host, names, weights, thin, mix)
    _check_apart(entries, copies)
    found = _holding(host, names, tuple(copies), entries)
    if found is None:
        return None
    method, tensors = found
    made = {f"adapter.{path}.copy.{leaf}": v for path, leaves in copies.items() for leaf, v in leaves.items()}
    host.attach(method, into, active=False, saved={**tensors, **made})
    counts = {name: sum(len(index) for index, _ in held.values()) for name, held in changes.items()}
    total = sum(len(index) for index, _ in entries.values())
    return United(into, method.id, total, counts, _overlap(changes), tuple(copies))


def _changes(host: Host, name: str) -> dict[str, Sparse]:
    """What an adapter that is switched off changes of each parameter."""
    found: dict[str, Sparse] = {}
    for patch in [patch for key in host.parts(name) for patch in host.patches[key].values()]:
        assert patch.entries is not None
        index, order = patch.entries.index().sort()
        values = patch.entries.values().flatten().to(index.device)[order]
        base = exact(host.model.get_parameter(patch.path)).view(-1)
        if len(index):
            found[patch.path] = index.to(base.device), values.to(base) - base[index.to(base.device)]
    return found


def _on_union(here: Sequence[tuple[float, Sparse]], mix: Mix) -> Sparse:
    """The combined change of one parameter."""
    index = torch.cat([index for _, (index, _) in here]).unique()
    wide = []
    for _, (own, change) in here:
        wide.append(change.new_zeros(len(index)))
        wide[-1][torch.searchsorted(index, own)] = change
    return index, mix(wide, [w for w, _ in here])


def _copies(
    host: Host, names: Sequence[str], weights: Sequence[float], thin: Callable[[Tensor], Tensor], mix: Mix
) -> dict[str, dict[str, Tensor]]:
    """New values of all parameters and buffers of the modules that some of the adapters train whole."""
    found: dict[str, list[tuple[float, Copy]]] = {}
    for name, weight in zip(names, weights, strict=True):
        for key in host.parts(name):
            for path, adapter in host.adapters(key).items():
                if isinstance(adapter, Copy):
                    found.setdefault(path, []).append((weight, adapter))
    made: dict[str, dict[str, Tensor]] = {}
    for path, held in found.items():
        module = held[0][1].site.module
        made[path] = {leaf: value.clone() for leaf, value in held[0][1].copy.state_dict().items()}
        for leaf, _ in held[0][1].copy.named_parameters():
            base = exact(module.get_parameter(leaf))
            changes = [exact(adapter.copy.get_parameter(leaf)).to(base) - base for _, adapter in held]
            made[path][leaf] = base + mix([thin(change) for change in changes], [w for w, _ in held])
    return made


def _check_apart(entries: dict[str, Sparse], copies: dict[str, Any]) -> None:
    for path in entries:
        whole = next((copied for copied in copies if path.startswith(f"{copied}.")), None)
        if whole is not None:
            raise MergeError(
                f"One of the adapters trains {whole} whole (modules_to_save), and another one has entries of {path}: "
                "no adapter can hold both. Combine them into a LoRA (how='svd'), or train them alike."
            )


def _holding(
    host: Host, names: Sequence[str], copied: tuple[str, ...], entries: dict[str, Sparse]
) -> tuple[Method, dict[str, Tensor]] | None:
    """The first of the methods that can hold the entries, and the tensors of its adapter."""
    for name in names:
        method = host.methods[name].model_copy(update={"modules_to_save": copied})
        tensors = method.with_entries(host, entries)
        owned = [patch.chosen for patch in host.patches[name].values()]
        if tensors is None and owned and all(isinstance(chosen, OwnVector) for chosen in owned):
            tensors = as_saved(entries)
        if tensors is not None:
            return method, dict(tensors)
    return None


def _overlap(changes: dict[str, dict[str, Sparse]]) -> dict[str, float]:
    found = {}
    for (one, left), (other, right) in itertools.combinations(changes.items(), 2):
        both = sum(int(torch.isin(left[path][0], right[path][0]).sum()) for path in left.keys() & right.keys())
        fewest = min(sum(len(index) for index, _ in held.values()) for held in (left, right))
        found[f"{one} & {other}"] = both / fewest if fewest else 0.0
    return found
