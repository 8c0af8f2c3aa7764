"""The strongest singular directions of the base weight."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from adapterlab.init._base import balanced
from adapterlab.init._directions import Directions


class PiSSA(Directions):
    """A and B hold the r largest singular triplets of W, the base keeps the rest.

    The fast decomposition is randomised. It finds slightly worse directions, but what the base keeps is formed from the
    factors actually found, so the start is as exact.
    """

    niter: int | None = Field(
        None, ge=0, description="iterations of a fast randomised SVD, such as 4 or 16; null: the exact one"
    )

    def factors(self, weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
        """The first r triplets, each factor with the root of its singular values."""
        if self.niter is None:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            return balanced(u[:, :r], s[:r], vh[:r], scale)
        u, s, v = torch.svd_lowrank(weight, q=r, niter=self.niter)
        return balanced(u, s, v.T, scale)
