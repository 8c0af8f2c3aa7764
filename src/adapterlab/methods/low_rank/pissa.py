"""LoRA that starts on the strongest directions of the base weight."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from adapterlab.methods.low_rank._directions import Directions
from adapterlab.methods.low_rank._starts import Init, balanced
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register


@register
class PiSSA(LoRA):
    """Move the r largest singular triplets of W into the factors and freeze the rest.

    W = U S Vᵀ; B = U_r √(S_r/s), A = √(S_r/s) V_rᵀ; y = (W − s · B0 A0) x + b + s · B A x, A0 and B0 the start.

    Where it attaches: as LoRA; all linear layers by default. Weights must be neither packed nor tied.

    Start: the first output equals the base's up to rounding. The base weight is replaced while the adapter is live, and
    the original comes back to the bit when it is switched off; that costs a second copy of the adapted weights.

    Trainable parameters: r (in + out) for each module.

    Inference: merges as LoRA does. Saving converts to an ordinary LoRA of rank 2r on the original base,
    s (B A − B0 A0) = s [B, −B0] [A; A0], which any reader of LoRA can use.

    Rate: 2e-5, as in the authors' runs, a tenth of LoRA's. Keep alpha = r and no dropout, which would discard principal
    directions. `init={name: pissa, niter: 4}` takes a fast randomised decomposition.

    Reference: "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    arXiv 2404.02948.

    Example:
        >>> from adapterlab.methods.low_rank.pissa import PiSSA
        >>> PiSSA(init={"name": "pissa", "niter": 4}).init.niter
        4
    """

    alpha: float = Field(8.0, gt=0, description="scale numerator; the same as the rank is usual here")
    init: Init = Field("pissa", validate_default=True, description="pissa, or with options {name: pissa, niter: 4}")


class PiSSAStart(Directions):
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
