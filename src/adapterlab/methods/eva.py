"""LoRA that starts on the directions in which its inputs vary most."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from adapterlab.init import Init
from adapterlab.methods.lora import LoRA
from adapterlab.registry import register


@register
class EVA(LoRA):
    """Start A with the principal components of the module's inputs, and give ranks to where they explain most.

    y = W x + b + s · B A x; A = first r_l right singular vectors of the centred inputs, B = 0.

    Where it attaches: linear layers, packed ones too; the base stays as it is. `prepare` runs the model on training
    batches; the training loop calls it. Until then the start is LoRA's. Every module may get up to rho · r ranks, the
    total stays what it was, and a module that gets none loses its adapter. With rho = 1 ranks stay as they are.

    Start: B = 0, so the first output equals the base's.

    Trainable parameters: Σ r_l (in_l + out_l), where the r_l add up to r for each module.

    Inference: merges as LoRA does; saved as an ordinary LoRA with a rank for each module.

    Reference: "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv 2410.07170.

    Example:
        >>> from adapterlab.methods.eva import EVA
        >>> EVA(init={"name": "eva", "rho": 1}).init.rho
        1.0
    """

    paper: ClassVar[str] = "Parameter Efficient Fine-tuning via Explained Variance Adaptation"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2410.07170"
    formula: ClassVar[str] = "Σ r_l (in_l + out_l)"

    init: Init = Field("eva", validate_default=True, description="eva, or with options {name: eva, rho: 1}")
