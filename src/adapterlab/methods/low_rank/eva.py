"""LoRA that starts on the directions in which its inputs vary most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adapterlab.core.carrier import Carrier
from adapterlab.methods.low_rank._shown_data import inputs, labelled, shown
from adapterlab.methods.low_rank._starts import Init, Initialiser, Place, Start, Starts
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register


@register
class EVA(LoRA):
    """Start A with the principal components of the module's inputs, and give ranks to where they explain most.

    y = W x + b + s · B A x; A = first r_l right singular vectors of the centred inputs, B = 0.

    Where it attaches: linear layers, packed ones too; the base stays as it is. `prepare` runs the model on training
    batches; the training loop calls it. Until then the start is LoRA's. Every module may get up to rho · r ranks, the
    total stays what it was, and a module that gets none loses its adapter. With rho = 1 ranks stay as they are.

    Start: B = 0, so the first output equals the base's.

    Trainable parameters: Σ r_l (in_l + out_l), where the r_l add up to r for each module.

    Inference: merges as LoRA does; saved as an ordinary LoRA with a rank for each module.

    Rate: 5e-4, as in the authors' runs.

    Reference: "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv 2410.07170.

    Example:
        >>> from adapterlab.methods.low_rank.eva import EVA
        >>> EVA(init={"name": "eva", "rho": 1}).init.rho
        1.0
    """

    formula: ClassVar[str] = "Σ r_l (in_l + out_l)"

    init: Init = Field("eva", validate_default=True, description="eva, or with options {name: eva, rho: 1}")


class EVAStart(Initialiser):
    """A holds the first principal components of what enters the module, B is zero; ranks go where variance is.

    Each module computes up to rho · r components; over all modules those that explain the largest share of their
    module's variance win, so the ranks add up to what they did. A module without any loses its adapter. The scale s
    stays what it was.
    """

    needs_data: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    rho: float = Field(2.0, ge=1, description="how many times its rank a module may get; 1 leaves the ranks alone")
    tau: float = Field(0.99, gt=0, le=1, description="stop when a batch turns no component further than this cosine")
    batches: int = Field(64, ge=1, description="number of batches at most")

    @torch.no_grad()
    def learn(self, host: Carrier, places: Mapping[str, Place], batches: Iterable[Mapping[str, Tensor]]) -> Starts:
        """Find components batch by batch, then share the ranks out."""
        wanted = {path: min(round(self.rho * p.r), p.site.shape[1]) for path, p in places.items()}
        seen: dict[str, Components] = {}
        for batch in shown(batches, self.batches, "principal components"):
            fresh = self._updated(host, places, batch, wanted, seen)
            settled = all(path in seen and fresh[path].cosine(seen[path]) >= self.tau for path in fresh)
            seen.update(fresh)
            if settled:
                break
        ranks = self._ranks(places, seen)
        return {path: self._start(place, seen.get(path), ranks.get(path, place.r)) for path, place in places.items()}

    def _updated(
        self,
        host: Carrier,
        places: Mapping[str, Place],
        batch: Mapping[str, Tensor],
        wanted: Mapping[str, int],
        seen: Mapping[str, Components],
    ) -> dict[str, Components]:
        """The components of each module with the rows of one more batch."""
        fresh: dict[str, Components] = {}
        last: list[tuple[str, Tensor]] = []

        def see(path: str, given: Tensor) -> None:
            x = labelled(given, batch)
            # Query, key and value see the same input: one decomposition serves them all.
            same = [p for p, rows in last if wanted[p] == wanted[path] and torch.equal(rows, x)]
            fresh[path] = fresh[same[0]] if same else Components.of(seen.get(path), x, wanted[path])
            last[:] = [(path, x)]

        inputs(host, places, batch, see)
        return fresh

    def _ranks(self, places: Mapping[str, Place], seen: Mapping[str, Components]) -> dict[str, int]:
        budget = sum(places[path].r for path in seen)
        if self.rho == 1:
            return {path: places[path].r for path in seen}
        shares = sorted(((float(s), path) for path, c in seen.items() for s in c.shares), reverse=True)[:budget]
        return {path: sum(p == path for _, p in shares) for path in seen}

    def _start(self, place: Place, seen: Components | None, rank: int) -> Start | None:
        if rank == 0:
            return None
        if seen is None:  # never called, such as an expert that no token chose
            return self.start(place)
        a = seen.axes[:rank]
        return Start(a, a.new_zeros(place.site.shape[0], len(a)))


@dataclass(frozen=True)
class Components:
    """Principal components of all rows seen so far.

    Attributes:
        axes: `[k, in]`, orthonormal, strongest first.
        strengths: singular values `[k]` of the centred rows.
        mean: `[in]` of the rows.
        count: number of rows.
        total: sum of the squared distances of the rows from their mean.
    """

    axes: Tensor
    strengths: Tensor
    mean: Tensor
    count: int
    total: float

    @property
    def shares(self) -> Tensor:
        """What share of the variance each component explains `[k]`."""
        return self.strengths.square() / max(self.total, 1e-30)

    @classmethod
    def of(cls, before: Components | None, x: Tensor, k: int) -> Components:
        """Add rows `[n, in]`, keeping k components."""
        mean, count = x.mean(0), len(x)
        centred = x - mean
        total = float(centred.square().sum())
        stack = [centred]
        if before is not None:
            gap = before.mean - mean
            weight = before.count * count / (before.count + count)
            stack = [before.strengths[:, None] * before.axes, centred, weight**0.5 * gap[None]]
            total += before.total + weight * float(gap.square().sum())
            mean = (before.mean * before.count + mean * count) / (before.count + count)
            count += before.count
        _, s, vh = torch.linalg.svd(torch.cat(stack), full_matrices=False)
        return cls(vh[:k], s[:k], mean, count, total)

    def cosine(self, other: Components) -> float:
        """The smallest absolute cosine between corresponding components."""
        if len(self.axes) != len(other.axes):
            return 0.0
        return float((self.axes * other.axes).sum(1).abs().min())
