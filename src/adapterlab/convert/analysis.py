"""What a change of weights looks like: its spectrum, and how it divides into magnitude and direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adapterlab.convert.changes import Change, Changes, exact
from adapterlab.convert.low_rank import svd, wide
from adapterlab.errors import MergeError

STEPS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Spectrum:
    """The change of one weight matrix.

    Attributes:
        path: of the module.
        role: of the module, or None.
        layer: it is in, or None.
        norm: Frobenius norm of the change.
        relative: the same relative to that of the weight.
        effective_rank: exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007).
        stable_rank: ‖ΔW‖²_F / σ₁².
        rank: number of singular values above rounding.
        energy: number k -> share of the squared norm in the k largest singular values.
        magnitude: ΔM of DoRA: mean over outputs of | ‖w'‖ − ‖w‖ |, w a row of the weight `[out, in]`.
        direction: ΔD of DoRA: mean over outputs of 1 − cos(w', w).
        singular_values: in falling order, down to rounding; they may be cut off at 256.
    """

    path: str
    role: str | None
    layer: int | None
    norm: float
    relative: float
    effective_rank: float
    stable_rank: float
    rank: int
    energy: dict[int, float]
    magnitude: float
    direction: float
    singular_values: tuple[float, ...]

    def share(self, k: int) -> float:
        """Share of the squared norm in the k largest singular values, of which 256 are known."""
        return min(1.0, sum(value**2 for value in self.singular_values[:k]) / self.norm**2)


@dataclass(frozen=True)
class Analysis:
    """The changes of all weight matrices of an adapter or model.

    Attributes:
        spectra: one for each matrix that changed, in model order.
        correlation: Pearson correlation of ΔM and ΔD over the matrices; None with fewer than three, or where one of
            them does not vary. DoRA's paper finds it positive for LoRA and negative for full tuning.
        by_role: the same within each role.
        others: norms of the changes of parameters that are no matrices.
        unchanged: paths of the modules in which nothing changed, such as those that kept no rank.
    """

    spectra: tuple[Spectrum, ...]
    correlation: float | None
    by_role: dict[str, float | None]
    others: dict[str, float]
    unchanged: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return asdict(self)


def analyze(changes: Changes, progress: Callable[[str, int, int], None] | None = None) -> Analysis:
    """Describe every change of a weight matrix.

    Args:
        changes: `AdapterChanges` (inside `host.using()`) or `ModelChanges`.
        progress: called with the phase, the modules done, and their number.

    Raises:
        MergeError: no weight matrix changed.
    """
    spectra: list[Spectrum] = []
    others: dict[str, float] = {}
    unchanged: list[str] = []
    for done, path in enumerate(changes.sites):
        change = changes.at(path)
        if change is None:
            unchanged.append(path)
        else:
            others |= {f"{path}.{leaf}": float(wide(v).norm()) for leaf, v in change.others.items()}
            if change.weight is not None:
                spectra.append(_spectrum(change))
        if progress:
            progress("decomposing", done + 1, len(changes.sites))
    if not spectra:
        raise MergeError(
            "There is no change of a weight matrix to analyse"
            + (f"; only {', '.join(list(others)[:4])} changed." if others else ": nothing changed. Was it trained?")
        )
    roles = dict.fromkeys(s.role for s in spectra if s.role)
    by_role = {str(role): _correlation([s for s in spectra if s.role == role]) for role in roles}
    return Analysis(tuple(spectra), _correlation(spectra), by_role, others, tuple(unchanged))


def cosine(ours: Changes, theirs: Changes) -> dict[str, float]:
    """Return the cosine of the changes of each matrix that both changed: 1 for the same direction, 0 for unrelated."""
    found = {}
    for path in ours.sites:
        a, b = ours.at(path), theirs.at(path)
        if a is not None and b is not None and a.weight is not None and b.weight is not None:
            x, y = wide(a.weight).cpu(), wide(b.weight).cpu()
            found[path] = float((x * y).sum() / (x.norm() * y.norm()))
    return found


@torch.no_grad()
def _spectrum(change: Change) -> Spectrum:
    assert change.weight is not None
    site = change.site
    s = torch.linalg.svdvals(wide(change.weight)) if change.factors is None else svd(change.factors)[1]
    real = s[: max(1, int((s > change.floor).sum()))]
    shares = real / real.sum()
    squares = real.square()
    total = float(squares.sum())
    weight = wide(exact(site.weight()))
    magnitude, direction = _decomposed(weight, weight + wide(change.weight))
    return Spectrum(
        path=site.path,
        role=site.role,
        layer=site.layer,
        norm=math.sqrt(total),
        relative=math.sqrt(total) / max(float(weight.norm()), 1e-30),
        effective_rank=math.exp(-float(torch.special.xlogy(shares, shares).sum())),
        stable_rank=total / float(squares[0]),
        rank=len(real),
        energy={k: float(squares[:k].sum()) / total for k in STEPS if k <= min(site.shape)},
        magnitude=magnitude,
        direction=direction,
        singular_values=tuple(real[:256].tolist()),
    )


def _decomposed(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean change of the rows' norms, and of their directions."""
    norms, moved = before.norm(dim=1), after.norm(dim=1)
    turned = 1 - (before * after).sum(1) / (norms * moved).clamp_min(1e-30)
    return float((moved - norms).abs().mean()), float(turned.mean())


def _correlation(spectra: Iterable[Spectrum]) -> float | None:
    pairs = torch.tensor([(s.magnitude, s.direction) for s in spectra], dtype=torch.float64)
    if len(pairs) < 3:
        return None
    x, y = (pairs - pairs.mean(0)).T
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 1e-15 * float(pairs.norm()) ** 2 else None
