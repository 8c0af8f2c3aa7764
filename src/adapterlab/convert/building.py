"""Writing changes down as a LoRA adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapterlab.convert.changes import MATRICES, Change, oriented
from adapterlab.convert.low_rank import Factors, Fit, wide
from adapterlab.core.targets import Targets
from adapterlab.errors import MergeError
from adapterlab.hosts import Host
from adapterlab.methods.low_rank.lora import LoRA


@dataclass(frozen=True)
class Module:
    """How well one module's change is represented.

    Attributes:
        path: of the module.
        rank: of the factors.
        error: relative Frobenius error.
        energy: share of the squared norm that is kept, 1 − error².
    """

    path: str
    rank: int
    error: float
    energy: float


@dataclass(frozen=True)
class Conversion:
    """The LoRA adapter that was made, and what it keeps of the change it stands for.

    Attributes:
        name: of the adapter.
        modules: those with factors, in model order.
        error: relative Frobenius error over all parameters that changed.
        energy: share of the squared norm that is kept, 1 − error².
        saved: modules that are kept in full, as `modules_to_save`.
        dropped: parameters that are left out -> Frobenius norm of their change relative to that of the whole change.
    """

    name: str
    modules: tuple[Module, ...]
    error: float
    energy: float
    saved: tuple[str, ...] = ()
    dropped: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> Module:
        """The module with the largest relative error."""
        return max(self.modules, key=lambda module: module.error)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by path."""
        return {module.path: module.rank for module in self.modules}

    def notes(self) -> dict[str, str]:
        """Facts for the card of the adapter."""
        return {"Relative error": f"{self.error:.3g} (worst: {self.worst.error:.3g} at {self.worst.path})"}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "modules": [asdict(m) for m in self.modules], "worst": asdict(self.worst)}


@dataclass
class Draft:
    """The parts of a LoRA adapter as they are collected, module by module.

    Attributes:
        fits: factors by path.
        biases: shifts of the output by path; each path has factors.
        copies: new values of all changed parameters of modules that are kept in full.
        dropped: squared norms of what is left out.
        norms: squared norms of what is kept exactly.
    """

    fits: dict[str, Fit] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    dropped: dict[str, float] = field(default_factory=dict)
    norms: float = 0.0

    def add(self, change: Change, fitted: Callable[[Change], Fit], *, keep: bool = True, low_rank: bool = True) -> None:
        """Take up the change of one module.

        Args:
            change: of the module.
            fitted: makes the factors of a weight's change.
            keep: also keep what factors cannot say; without it, that is dropped and reported.
            low_rank: the weight may become factors.
        """
        path, others, weight = change.site.path, change.others, change.weight
        factored = low_rank and not change.whole and change.site.kind in MATRICES and set(others) <= {"bias"}
        if not keep:
            lost = others if factored or weight is None else {"weight": weight, **others}
            self.dropped |= {f"{path}.{leaf}": _square(value) for leaf, value in lost.items()}
            others, weight = {}, weight if factored else None
        self.norms += sum(map(_square, others.values()))
        if factored and (weight is not None or others):
            self.fits[path] = _nothing(change) if weight is None else fitted(change)
            if others:
                self.biases[path] = others["bias"]
        elif weight is not None or others:
            self.copies[path] = dict(others)
            if weight is not None:
                self.copies[path]["weight"] = oriented(change.site, weight)
                self.norms += _square(weight)

    def attach(self, host: Host, name: str) -> Conversion:
        """Put the adapter on the model, switched off.

        Raises:
            MergeError: there are no factors to write.
            AttachError: the name is taken.
        """
        if not self.fits:
            raise MergeError(
                f"{name!r} would have no module with factors: no weight matrix changed"
                + (f", only {', '.join([*self.copies, *self.dropped][:4])}" if self.copies or self.dropped else "")
                + ". An adapter that was never trained changes nothing; changes of norms and biases alone are best "
                "kept as they are (host.save)."
            )
        ranks = {path: fit.factors.rank for path, fit in self.fits.items()}
        common = Counter(ranks.values()).most_common(1)[0][0]
        pattern = {path: rank for path, rank in ranks.items() if rank != common}
        # The scale is one everywhere: it is in the factors, so no flag or option can change what they mean.
        method = LoRA(
            r=common, alpha=common, targets=Targets(include=tuple(ranks)), rank_pattern=pattern, alpha_pattern=pattern,
            lora_bias=bool(self.biases), modules_to_save=tuple(self.copies),
        )  # fmt: skip
        host.attach(method, name, active=False)
        _write(host.tensors(name), self)
        return self._report(name)

    def _report(self, name: str) -> Conversion:
        lost = sum(fit.lost**2 for fit in self.fits.values()) + sum(self.dropped.values())
        total = sum(fit.norm**2 for fit in self.fits.values()) + sum(self.dropped.values()) + self.norms
        modules = [Module(p, f.factors.rank, f.error, 1 - f.error**2) for p, f in self.fits.items()]
        share = lost / total if total else 0.0
        dropped = {path: math.sqrt(square / total) for path, square in self.dropped.items()}
        return Conversion(name, tuple(modules), math.sqrt(share), 1 - share, tuple(self.copies), dropped)


@torch.no_grad()
def _write(tensors: Mapping[str, Tensor], draft: Draft) -> None:
    for path, fit in draft.fits.items():
        tensors[f"adapter.{path}.A"].copy_(fit.factors.A)
        tensors[f"adapter.{path}.B"].copy_(fit.factors.B)
    for path, shift in draft.biases.items():
        tensors[f"adapter.{path}.bias"].copy_(shift)
    for path, changes in draft.copies.items():
        for leaf, delta in changes.items():
            tensors[f"adapter.{path}.copy.{leaf}"].add_(delta)  # a copy starts as the base is


def _nothing(change: Change) -> Fit:
    """Factors of a weight that did not change, for a module of which only the bias did."""
    out, in_ = change.site.shape
    bias = change.others["bias"]
    return Fit(Factors(bias.new_zeros(out, 1), bias.new_zeros(1, in_)), 0.0, 0.0)


def _square(tensor: Tensor) -> float:
    return float(wide(tensor.detach()).square().sum())
