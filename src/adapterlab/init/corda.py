"""Directions of the base weight weighed by what enters the module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adapterlab.init._base import Initialiser, Place, Start, Starts, balanced, full_weight, part_of
from adapterlab.init._data import inputs, shown

if TYPE_CHECKING:
    from adapterlab.core.host import Host


class CorDA(Initialiser):
    """A and B hold r of the components of W in the basis in which its outputs on the data are ordered by size.

    With C = mean of x xᵀ over the inputs: W C = U S Vᵀ, so W = U S (Vᵀ C⁻¹). B = U √(S/s), A = √(S/s) Vᵀ C⁻¹ of the
    chosen components, and the base gives up s · B A. Needs a matrix `[in, in]` for each module while it looks at data.
    """

    moves_base: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    mode: Literal["ipm", "kpm"] = Field(
        "ipm", description="ipm: the strongest components, data of the task; kpm: the weakest, data of what to keep"
    )
    batches: int = Field(256, ge=1, description="number of batches at most")

    def check(self, place: Place) -> None:
        """Refuse modules without so many components too."""
        super().check(place)
        part_of(place, place.r, f"init={self.name!r}")

    @torch.no_grad()
    def learn(self, host: Host, places: Mapping[str, Place], batches: Iterable[Mapping[str, Tensor]]) -> Starts:
        """Add the covariances up, then decompose one module after the other."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = dict.fromkeys(places, 0)

        def see(path: str, x: Tensor) -> None:
            sums[path] = sums.get(path, 0) + x.T @ x
            counts[path] += len(x)

        for batch in shown(batches, self.batches, "input covariances"):
            inputs(host, places, batch, see)
        return {p: self.oriented(place, sums[p] / max(1, counts[p])) for p, place in places.items() if p in sums}

    def oriented(self, place: Place, covariance: Tensor) -> Start:
        """Decompose a weight in the basis that a covariance `[in, in]` gives."""
        weight, c = full_weight(place.site).double(), covariance.double()
        ridge = max(0.01 * float(c.diagonal().mean()), 1e-12)
        eye = torch.eye(len(c), dtype=c.dtype, device=c.device)
        while True:
            raised = c + ridge * eye
            inverse, fault = torch.linalg.inv_ex(raised)
            if not int(fault) and float((raised @ inverse - eye).norm()) < 0.05:
                break
            ridge *= 2
        u, s, vh = torch.linalg.svd(weight @ raised, full_matrices=False)
        chosen = slice(place.r) if self.mode == "ipm" else slice(-place.r, None)
        a, b = (t.float() for t in balanced(u[:, chosen], s[chosen], vh[chosen] @ inverse, place.scale))
        return Start(a, b, (a, b))
