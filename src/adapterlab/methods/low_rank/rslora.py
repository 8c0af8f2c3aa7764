"""LoRA with a scale that suits every rank."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import nn

from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register


@register
class RsLoRA(LoRA):
    """Scale the update by alpha / √r instead of alpha / r, so that it learns as fast at high ranks as at low ones.

    y = W x + b + s · B A drop(x), s = alpha / √r.

    Where it attaches: as LoRA.

    Start: B = 0, so the first output equals the base's.

    Trainable parameters: r (in + out) for each module.

    Inference: merges as LoRA does.

    Rate: 2e-4, LoRA's divided by √r at r = 8; a rate tuned for alpha / r is too high at large ranks, while alpha / √r
    of plain LoRA gives the same scale.

    Reference: "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732.

    Example:
        >>> from adapterlab.methods.low_rank.rslora import RsLoRA
        >>> RsLoRA(r=64, alpha=16, targets=["q"]).scaling("layers.0.q_proj")
        2.0
    """

    scale: Literal["sqrt"] = Field("sqrt", description="alpha / √r")

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """A scale that narrow layers bear: with the default one, rounding in half precision shows."""
        return {"alpha": 4.0}
