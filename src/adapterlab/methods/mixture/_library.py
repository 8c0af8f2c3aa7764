"""Saved low-rank adapters as material: their updates module by module, and ways to make one of them."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.adapter import Copy, Delta
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.engine.wrapping import plain_copy
from adapterlab.errors import AttachError
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.mixture._saved_adapters import opened

Mix = Literal["factors", "deltas"]


class Update(NamedTuple):
    """What one adapter does at one module: ΔW = scale · B A.

    Attributes:
        A: `[r, in]`.
        B: `[out, r]`.
        scale: the factor.
    """

    A: Tensor
    B: Tensor
    scale: float


class Place(NamedTuple):
    """One module and what the adapters of a library do there.

    Attributes:
        site: the module.
        updates: by the name of the part; those that leave the module alone are missing.
    """

    site: Site
    updates: dict[str, Update]


def library(host: Carrier, name: str, id: str, entries: Mapping[str, str]) -> dict[str, Place]:
    """Read the updates of saved adapters, by the path of the module; heads that they trained whole are left behind.

    Args:
        host: of the model.
        name: of the adapter that is made of them.
        id: of its method.
        entries: folders, or names of adapters on the model, by the name of the part.

    Raises:
        FormatError: a folder holds no adapter, or one that does not fit the model.
        AttachError: an adapter is not made of plain low-rank updates of linear layers alone.
    """
    found: dict[str, dict[str, Update]] = {}
    for part, source in opened(host, name, entries):
        for path, update in _updates(host, id, part, source):
            found.setdefault(path, {})[part] = update
    if not found:
        raise AttachError(f"{id}: none of the adapters {', '.join(entries)} adapts a linear layer. Name others.")
    sites = {site.path: site for site in host.all_sites() if site.path in found}
    return {path: Place(site, found[path]) for path, site in sites.items()}


def _updates(host: Carrier, id: str, part: str, source: str) -> Iterator[tuple[str, Update]]:
    replaced = set(host.patches[source])
    for path, adapter in host.adapters(source).items():
        if isinstance(adapter, Copy):
            continue
        if not isinstance(adapter, Delta) or adapter.low_rank() is None:
            raise AttachError(
                f"{id}: adapters[{part!r}] ({host.methods[source].id}) has at {path} what is no plain low-rank update "
                "of a linear layer. Convert it (adapterlab export writes a plain LoRA of any linear method), or "
                "leave it out."
            )
        whole = adapter.change()
        if whole is not None:
            replaced.discard(f"{path}.weight")
        a, b = adapter.factors() if whole is None else whole  # type: ignore[misc]
        yield path, Update(a.detach().clone(), b.detach().clone(), adapter.scale)
    if replaced or host.part_methods(source):
        what = f"base parameters such as {min(replaced)}" if replaced else "several parts"
        raise AttachError(
            f"{id}: adapters[{part!r}] ({host.methods[source].id}) has {what}, which no low-rank update says. Convert "
            "it (adapterlab export writes a plain LoRA of any linear method), or leave it out."
        )


def check_targets(id: str, names: Mapping[str, Any], places: Mapping[str, Place], instead: str = "") -> None:
    """Require that all adapters stand at the same modules.

    Args:
        id: of the method.
        names: of all parts.
        places: what they do where.
        instead: what else can be done.

    Raises:
        AttachError: they do not.
    """
    for path, place in places.items():
        for part in names:
            if part not in place.updates:
                raise AttachError(
                    f"{id}: adapters[{next(iter(place.updates))!r}] adapts {path} and adapters[{part!r}] does not, and "
                    f"they are mixed module by module. Train them with the same targets{instead}."
                )


def check_ranks(id: str, places: Mapping[str, Place], instead: str = "") -> None:
    """Require that all adapters of a module have one rank.

    Raises:
        AttachError: they do not.
    """
    for path, place in places.items():
        (first, one), *others = place.updates.items()
        for part, update in others:
            if len(update.A) != len(one.A):
                raise AttachError(
                    f"{id}: at {path} adapters[{first!r}] has rank {len(one.A)} and adapters[{part!r}] rank "
                    f"{len(update.A)}, and factors of different ranks cannot be added. Train them with one rank"
                    f"{instead}."
                )


def mixed(updates: Mapping[str, Update], weights: Mapping[str, float], mix: Mix) -> tuple[Tensor, Tensor]:
    """Make one update of several, with its scale in B.

    Args:
        updates: of one module, by the name of the part.
        weights: by the same names.
        mix: `factors`: A = Σ w_i A_i, B = Σ w_i s_i B_i, whose product has the terms w_i w_j s_i B_i A_j; `deltas`:
            factors side by side, whose product is Σ w_i s_i B_i A_i.

    Returns:
        A `[r, in]`, B `[out, r]`.
    """
    parts = [(weights[name], update) for name, update in updates.items()]
    if mix == "factors":
        a, b = torch.stack([w * u.A for w, u in parts]), torch.stack([w * u.scale * u.B for w, u in parts])
        return a.sum(0), b.sum(0)
    return torch.cat([u.A for _, u in parts]), torch.cat([w * u.scale * u.B for w, u in parts], 1)


def thin_svd(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose B A without making it: U `[.., out, k]`, singular values `[.., k]` in falling order, Vᵀ `[.., k, in]`.

    With A = R_Aᵀ Q_Aᵀ and B = Q_B R_B it is the decomposition of R_B R_Aᵀ, a matrix of the size of the rank.

    Args:
        a: A `[.., r, in]`.
        b: B `[.., out, r]`.
    """
    (right, ra), (left, rb) = torch.linalg.qr(a.mT), torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    return left @ u, s, vh @ right.mT


class Library(Method):
    """Something made of saved adapters, in which nothing trains by gradients."""

    starts_at_base: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    formula: ClassVar[str] = "0"

    adapters: dict[str, str] = Field(
        min_length=1,
        description="by the name of each part: the folder of a trained adapter or of its run, or its name on the model",
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Make two adapters with random values, and keep them in a folder as long as the process lasts."""
        from adapterlab.hosts import attach

        root = tempfile.TemporaryDirectory()
        _EXAMPLES.append(root)
        draw = torch.Generator().manual_seed(0)
        name = "example-of-a-part"  # the model may carry others
        host = attach(plain_copy(model), LoRA(r=4, alpha=4.0), name)
        for part in ("one", "two"):
            for p in host.parameters(name):
                p.data = 0.2 * torch.randn(p.shape, generator=draw).to(p)
            host.save(Path(root.name) / part, name)
        return {"adapters": {part: f"{root.name}/{part}" for part in ("one", "two")}}


_EXAMPLES: list[Any] = []  # folders, which are removed with the process


class Mixed(Delta):
    """One low-rank update that was made of several, and does not train.

    Attributes:
        A: `[r, in]`.
        B: `[out, r]`; the scale is in it.
    """

    casts: ClassVar[bool] = False
    holds: ClassVar[tuple[str, str] | None] = ("A", "B")

    def __init__(self, site: Site, rank: int):
        super().__init__(site)
        self.A, self.B = site.parameter(rank, site.shape[1]), site.parameter(site.shape[0], rank)
        self.requires_grad_(False)

    @torch.no_grad()
    def take(self, a: Tensor, b: Tensor) -> None:
        """Become another update of the same rank."""
        self.A.copy_(a)
        self.B.copy_(b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as they are."""
        return self.A, self.B


class MixedLibrary(Library):
    """Saved adapters made into one plain LoRA: `mixture` says which."""

    hf: ClassVar[HFCodec | None] = HFCodec(
        "LORA",
        fields={},
        tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
        outward=lambda method, layers: (
            _ranks({path: len(layer.A) for path, layer in layers.items()}),
            {path: {"A": layer.A, "B": layer.B} for path, layer in layers.items()},
        ),
        inward=lambda method, site, tensors: tensors,
    )

    def mixture(self, updates: Mapping[str, Update]) -> tuple[Tensor, Tensor]:
        """Make the one update of a module: A `[r, in]`, B `[out, r]` with the scale in it."""
        raise NotImplementedError

    def check(self, places: Mapping[str, Place]) -> None:
        """Require that the adapters can be mixed.

        Raises:
            AttachError: they cannot.
        """

    def places(self, host: Carrier, name: str) -> dict[str, Place]:
        """What the adapters do where, checked."""
        found = library(host, name, self.id, self.adapters)
        self.check(found)
        return found

    def attach(self, host: Carrier, name: str) -> None:
        """Make one update of those of the adapters, at every module that any of them adapts.

        Raises:
            FormatError: a folder holds no adapter, or one that does not fit the model.
            AttachError: an adapter has something else than low-rank updates, or the adapters do not fit each other.
        """
        for place in self.places(host, name).values():
            a, b = self.mixture(place.updates)
            layer = Mixed(place.site, len(a))
            layer.take(a, b)
            host.wrap(name, place.site, layer)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach what was made of the adapters, which need not be there any more."""
        for site in host.all_sites():
            a = tensors.get(f"adapter.{site.path}.A")
            if a is not None and site.kind == "linear":
                host.wrap(name, site, Mixed(site, len(a)))

    @staticmethod
    def layers(host: Carrier, name: str) -> dict[str, Mixed]:
        """The updates by the path of their module."""
        return {path: part for path, part in host.adapters(name).items() if isinstance(part, Mixed)}


def _ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's options for updates without a scale: the most common rank, and the exceptions by path."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != r}
    # PEFT divides alpha by the rank.
    return {"r": r, "lora_alpha": r, "rank_pattern": others, "alpha_pattern": others}
