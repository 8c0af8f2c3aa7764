"""LoRA that starts by making up for what quantization loses."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from adapterlab.init import Init
from adapterlab.methods.lora import LoRA
from adapterlab.registry import register


@register
class LoftQ(LoRA):
    """Quantize the base weight and start the factors with the best approximation of the error.

    Q = quant(W − s · B A), s · B A = first r singular triplets of W − Q, in turn; y = Q x + b + s · B A x.

    Where it attaches: as LoRA; all linear layers by default. The base is given in full precision; while the adapter is
    live its weights hold what the quantized ones unpack to, and the original comes back to the bit when it is off.

    Start: nearer to the base than its quantized form is, but not equal to it.

    Trainable parameters: r (in + out) for each module.

    Inference: merges into the unpacked weight. HF PEFT has no form for it on the original base, so it is saved in the
    project's own. With one iteration Q = quant(W), and the factors fit the same base loaded in NF4 as plain LoRA.

    The factors are divided by s, so that the correction is right for every alpha; the paper has s = 1.

    Reference: "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659.

    Example:
        >>> from adapterlab.methods.loftq import LoftQ
        >>> LoftQ(init={"name": "loftq", "bits": 2, "iterations": 5}).init.bits
        2
    """

    paper: ClassVar[str] = "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models"
    year: ClassVar[int] = 2023
    arxiv: ClassVar[str] = "2310.08659"
    starts_at_base: ClassVar[bool] = False

    alpha: float = Field(8.0, gt=0, description="scale numerator; the same as the rank is usual here")
    init: Init = Field(
        "loftq", validate_default=True, description="loftq, or with options {name: loftq, bits: 4, iterations: 5}"
    )
