"""LoRA that starts on orthonormal directions of the base weight."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from adapterlab.methods.low_rank._directions import Directions
from adapterlab.methods.low_rank._starts import Init
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register


@register
class OLoRA(LoRA):
    """Start the factors with the first r columns and rows of a QR decomposition of W, and freeze the rest.

    W = Q R; B = Q[:, :r], A = R[:r]; y = (W − s · B0 A0) x + b + s · B A x, where A0 and B0 are the start.

    Where it attaches: as LoRA, GPT-2's `Conv1D` included. Weights must be neither packed nor tied.

    Start: the first output equals the base's up to rounding; the base weight is replaced while the adapter is live.

    Trainable parameters: r (in + out) for each module.

    Inference: merges as LoRA does. Saving converts to an ordinary LoRA of rank 2r on the original base.

    Rate: 1e-4. The author's script has 3e-4 with s = 1/2; with s = 2, as here, a step moves W four times as far.

    Reference: "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775.

    Example:
        >>> from adapterlab.methods.low_rank.olora import OLoRA
        >>> OLoRA(r=8).init.name
        'olora'
    """

    init: Init = Field("olora", validate_default=True, description="olora")


class OLoRAStart(Directions):
    """W = Q R; B is the first r columns of Q, A the first r rows of R, and the base gives up s · B A."""

    def factors(self, weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
        """The first r columns and rows; they are not divided by the scale."""
        q, upper = torch.linalg.qr(weight)
        return upper[:r].contiguous(), q[:, :r].contiguous()
