"""LoRA that starts on directions of the base weight weighed by its inputs."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from adapterlab.init import Init
from adapterlab.methods.lora import LoRA
from adapterlab.registry import register


@register
class CorDA(LoRA):
    """Decompose W in the basis that orders its outputs on given data, and train the strongest or weakest components.

    W C = U S Vᵀ with C the covariance of the inputs; B = U_r √(S_r/s), A = √(S_r/s) V_rᵀ C⁻¹;
    y = (W − s · B0 A0) x + b + s · B A x, where A0 and B0 are the start.

    Where it attaches: linear layers, neither packed nor tied. `prepare` runs the model on batches; the training loop
    calls it with those of the task, which suits mode ipm. For mode kpm call it first, with data of what should be kept.
    Until then the start is LoRA's.

    Start: the first output equals the base's up to rounding; the base weight is replaced while the adapter is live.

    Trainable parameters: r (in + out) for each module.

    Inference: merges as LoRA does. Saving converts to an ordinary LoRA of rank 2r on the original base.

    Reference: "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
    Parameter-Efficient Fine-tuning", arXiv 2406.05223.

    Example:
        >>> from adapterlab.methods.corda import CorDA
        >>> CorDA(init={"name": "corda", "mode": "kpm"}).init.mode
        'kpm'
    """

    paper: ClassVar[str] = (
        "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware "
        "Parameter-Efficient Fine-tuning"
    )
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2406.05223"

    alpha: float = Field(8.0, gt=0, description="scale numerator; the same as the rank is usual here")
    init: Init = Field("corda", validate_default=True, description="corda, or with options {name: corda, mode: kpm}")
