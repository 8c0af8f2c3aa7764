"""LoRA whose first step moves the weight as full training would."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from adapterlab.init import Init
from adapterlab.methods.lora import LoRA
from adapterlab.registry import register


@register
class LoRAGA(LoRA):
    """Start the factors with singular vectors of the gradient of W.

    ∂L/∂W ≈ U S Vᵀ; A = c V[:, :r]ᵀ, B = c U[:, r:2r], c = out^¼/√gamma; y = (W − s · B0 A0) x + b + s · B A x, where A0
    and B0 are the start and s = alpha / √r.

    Where it attaches: as LoRA, to weights that are neither packed nor tied and have 2r directions. `prepare` averages
    gradients over training batches with dropout off; the training loop calls it. Until then the start is LoRA's.

    Start: the first output equals the base's up to rounding; the base weight is replaced while the adapter is live.

    Trainable parameters: r (in + out) for each module.

    Inference: merges as LoRA does. Saving converts to an ordinary LoRA of rank 2r on the original base.

    `init={name: lora_ga, size: gradient}` lets B grow with the gradient's size, as HF PEFT has it.

    Reference: "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000.

    Example:
        >>> from adapterlab.methods.lora_ga import LoRAGA
        >>> LoRAGA(r=4).init.direction
        'ArB2r'
    """

    paper: ClassVar[str] = "LoRA-GA: Low-Rank Adaptation with Gradient Approximation"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2407.05000"

    scale: Literal["linear", "sqrt"] = Field("sqrt", description="alpha / √r, or alpha / r")
    init: Init = Field(
        "lora_ga", validate_default=True, description="lora_ga, or with options {name: lora_ga, size: gradient}"
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """A scale that narrow layers bear: with the default one, rounding in half precision shows."""
        return {"r": 2, "alpha": 2.0}
