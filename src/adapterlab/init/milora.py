"""The weakest singular directions of the base weight."""

from __future__ import annotations

import torch
from torch import Tensor

from adapterlab.init._base import balanced
from adapterlab.init._directions import Directions


class MiLoRA(Directions):
    """A and B hold the r smallest singular triplets of W, the base keeps the rest. No fast form: the tail needs all."""

    def factors(self, weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
        """The last r triplets, each factor with the root of its singular values."""
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return balanced(u[:, -r:], s[-r:], vh[-r:], scale)
