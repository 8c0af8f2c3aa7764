"""LoRA that starts on orthonormal directions of the base weight."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from adapterlab.init import Init
from adapterlab.methods.lora import LoRA
from adapterlab.registry import register


@register
class OLoRA(LoRA):
    """Start the factors with the first r columns and rows of a QR decomposition of W, and freeze the rest.

    W = Q R; B = Q[:, :r], A = R[:r]; y = (W − s · B0 A0) x + b + s · B A x, where A0 and B0 are the start.

    Where it attaches: as LoRA, GPT-2's `Conv1D` included. Weights must be neither packed nor tied.

    Start: the first output equals the base's up to rounding; the base weight is replaced while the adapter is live.

    Trainable parameters: r (in + out) for each module.

    Inference: merges as LoRA does. Saving converts to an ordinary LoRA of rank 2r on the original base.

    Reference: "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775.

    Example:
        >>> from adapterlab.methods.olora import OLoRA
        >>> OLoRA(r=8).init.name
        'olora'
    """

    paper: ClassVar[str] = "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2406.01775"

    init: Init = Field("olora", validate_default=True, description="olora")
