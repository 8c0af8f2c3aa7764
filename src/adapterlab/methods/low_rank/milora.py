"""LoRA that starts on the weakest directions of the base weight."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from adapterlab.methods.low_rank._directions import Directions
from adapterlab.methods.low_rank._starts import Init, balanced
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register


@register
class MiLoRA(LoRA):
    """Move the r smallest singular triplets of W into the factors and freeze the rest, which holds what was learned.

    W = U S Vᵀ; B = U_−r √(S_−r/s), A = √(S_−r/s) V_−rᵀ; y = (W − s · B0 A0) x + b + s · B A x, A0 and B0 the start.

    Where it attaches: as LoRA; the paper adapts query, key, value, up and down projections. Weights must be neither
    packed nor tied. It needs a full decomposition of every weight.

    Start: the first output equals the base's up to rounding; the base weight is replaced while the adapter is live.

    Trainable parameters: r (in + out) for each module.

    Inference: merges as LoRA does. Saving converts to an ordinary LoRA of rank 2r on the original base.

    Rate: 3e-4, as in the authors' runs: small singular values make the first gradients small. Keep alpha = r.

    Reference: "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning", arXiv 2406.09044.

    Example:
        >>> from adapterlab.methods.low_rank.milora import MiLoRA
        >>> MiLoRA(r=8).init.name
        'milora'
    """

    alpha: float = Field(8.0, gt=0, description="scale numerator; the same as the rank is usual here")
    init: Init = Field("milora", validate_default=True, description="milora")


class MiLoRAStart(Directions):
    """A and B hold the r smallest singular triplets of W, the base keeps the rest. No fast form: the tail needs all."""

    def factors(self, weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
        """The last r triplets, each factor with the root of its singular values."""
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return balanced(u[:, -r:], s[-r:], vh[-r:], scale)
