"""LoRA whose first step moves the weight as full training would."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.methods.low_rank._shown_data import mean_gradients, shown
from adapterlab.methods.low_rank._starts import Init, Initialiser, Place, Start, Starts, part_of
from adapterlab.methods.low_rank.lora import LoRA
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

    Rate: 2e-5, as in the authors' runs on Llama 2.

    Reference: "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000.

    Example:
        >>> from adapterlab.methods.low_rank.lora_ga import LoRAGA
        >>> LoRAGA(r=4).init.direction
        'ArB2r'
    """

    scale: Literal["linear", "sqrt"] = Field("sqrt", description="alpha / √r, or alpha / r")
    init: Init = Field(
        "lora_ga", validate_default=True, description="lora_ga, or with options {name: lora_ga, size: gradient}"
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """A scale that narrow layers bear: with the default one, rounding in half precision shows."""
        return {"r": 2, "alpha": 2.0}


class LoRAGAStart(Initialiser):
    """A and B are singular vectors of the gradient, so that the first step moves W as full training would.

    G = ∂L/∂W, averaged over batches, ≈ U S Vᵀ. With ArB2r the first r columns of V become A and the next r of U become
    B: the first step then moves along the best part of rank 2r of G. The base gives up s · B A.
    """

    moves_base: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    direction: Literal["ArB2r", "A2rBr", "ArBr"] = Field(
        "ArB2r", description="which singular vectors: A first and B second r, the other way round, or every other one"
    )
    size: Literal["stable", "unit", "gradient"] = Field(
        "stable",
        description="length of the vectors: out^¼/√gamma for both; 1; or, as HF PEFT has it, 1 for A and out^¼/√gamma "
        "times the singular value for B",
    )
    gamma: float = Field(16.0, gt=0, description="larger values make the factors smaller")
    batches: int = Field(64, ge=1, description="number of batches at most")

    def check(self, place: Place) -> None:
        """Refuse modules without so many directions too."""
        super().check(place)
        part_of(place, 2 * place.r, f"init={self.name!r}")

    def learn(self, host: Carrier, places: Mapping[str, Place], batches: Iterable[Mapping[str, Tensor]]) -> Starts:
        """Average the gradients, then decompose them."""
        gradients = mean_gradients(host, places, shown(batches, self.batches, "gradients"))
        return {path: self.aligned(place, gradients[path]) for path, place in places.items()}

    @torch.no_grad()
    def aligned(self, place: Place, gradient: Tensor) -> Start:
        """Choose the factors from a gradient `[out, in]`."""
        r = place.r
        u, s, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
        even, odd = slice(0, 2 * r, 2), slice(1, 2 * r, 2)
        of_a, of_b = {
            "ArB2r": (slice(r), slice(r, 2 * r)), "A2rBr": (slice(r, 2 * r), slice(r)), "ArBr": (odd, even),
        }[self.direction]  # fmt: skip
        a, b = v[:, of_a].T, u[:, of_b]
        length = len(u) ** 0.25 / self.gamma**0.5
        if self.size == "stable":
            a, b = length * a, length * b
        elif self.size == "gradient":
            b = length * b * s[of_b]
        a, b = a.contiguous(), b.contiguous()
        return Start(a, b, (a, b))
