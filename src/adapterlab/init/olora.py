"""Orthonormal directions from a QR decomposition of the base weight."""

from __future__ import annotations

import torch
from torch import Tensor

from adapterlab.init._directions import Directions


class OLoRA(Directions):
    """W = Q R; B is the first r columns of Q, A the first r rows of R, and the base gives up s · B A."""

    def factors(self, weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
        """The first r columns and rows; they are not divided by the scale."""
        q, upper = torch.linalg.qr(weight)
        return upper[:r].contiguous(), q[:, :r].contiguous()
