"""LoRA that starts by making up for what quantization loses."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adapterlab.methods.low_rank._normal_float import quantized
from adapterlab.methods.low_rank._starts import Init, Initialiser, Place, Start, balanced, full_weight, part_of
from adapterlab.methods.low_rank.lora import LoRA
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

    Rate: 3e-4, as in the authors' scripts for GSM8K; 1e-4 for summarisation.

    Reference: "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659.

    Example:
        >>> from adapterlab.methods.low_rank.loftq import LoftQ
        >>> LoftQ(init={"name": "loftq", "bits": 2, "iterations": 5}).init.bits
        2
    """

    starts_at_base: ClassVar[bool] = False

    alpha: float = Field(8.0, gt=0, description="scale numerator; the same as the rank is usual here")
    init: Init = Field(
        "loftq", validate_default=True, description="loftq, or with options {name: loftq, bits: 4, iterations: 5}"
    )


class LoftQStart(Initialiser):
    """The base becomes Q = quant(W − L), and s · B A the best approximation of W − Q; then again with L = s · B A.

    L starts at zero. The best of the iterations is kept, since the error does not always fall. The base is of full
    precision and holds the values that the quantized one unpacks to: blocks of 64 along the flattened weight, codes of
    NF4 (and of the normal float with 2, 3 or 8 bits), scales not quantized. With one iteration Q = quant(W), so the
    adapter fits the base model loaded in NF4.
    """

    moves_base: ClassVar[bool] = True
    low_rank: ClassVar[bool] = False

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits of a code")
    iterations: int = Field(1, ge=1, description="how often base and factors are fitted to each other; the paper has 5")
    block: int = Field(64, ge=1, description="entries that share one scale")

    @torch.no_grad()
    def start(self, place: Place) -> Start:
        """Alternate between the base and the factors."""
        part_of(place, place.r, f"init={self.name!r}")
        weight, r = full_weight(place.site), place.r
        out, in_ = weight.shape
        before = (weight.new_zeros(r, in_), weight.new_zeros(out, r))
        best, least = None, float("inf")
        for _ in range(self.iterations):
            base = self.base(weight - place.scale * before[1] @ before[0])
            u, s, vh = torch.linalg.svd(weight - base, full_matrices=False)
            a, b = balanced(u[:, :r], s[:r], vh[:r], place.scale)
            error = float(s[r:].norm())
            if best is None or error < least:
                best, least = Start(a, b, before), error
            before = (a, b)
        assert best is not None
        return best

    def base(self, weight: Tensor) -> Tensor:
        """What the quantized weight unpacks to."""
        return quantized(weight, self.bits, self.block)
