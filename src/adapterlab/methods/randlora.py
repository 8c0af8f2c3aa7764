"""Full-rank updates made of random bases."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.site import Site
from adapterlab.io.hf_peft import HFCodec
from adapterlab.methods._bases import RandomBases, SlicedDelta, codec, seeded
from adapterlab.ops.low_rank import autocasts
from adapterlab.registry import register


@register
class RandLoRA(RandomBases):
    """A sum of random low-rank products that together have full rank; what trains are diagonal factors of theirs.

    ΔW = s · Σ_kj β_kj ⊗ (λ_kj A_k ⊙ γ_j), s = alpha / r, k < r, j < n. With lo = min(in, out), hi = max(in, out) and
    n = ⌈lo / r⌉: A `[r, lo]` and β `[r n, hi]` are random, frozen and the same for all modules; λ `[r, n]` and
    γ `[n, lo]` train. ΔW is `[hi, lo]`, transposed where in > out. The order of the bases is HF PEFT's.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too).

    Start: λ = 0, so the first output equals the base's.

    Trainable parameters: n (r + lo) for each module, about lo² / r + lo: a smaller r trains more.

    Inference: can be merged, at no cost. In training it costs more than LoRA, because the update is a dense matrix:
    about three times the layer's product on small batches, and less on large ones, where ΔW is formed once.

    The bases are as large as the largest weight. They are drawn from `seed` and not saved by default; the draw depends
    on the version of torch, so set `save_projection` for adapters that must last.

    Reference: "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv 2502.00987.

    Example:
        >>> from adapterlab.methods.randlora import RandLoRA
        >>> [list(t.shape) for t in RandLoRA(r=8).draw(out=64, in_=48)]
        [[8, 48], [64, 6, 8]]
    """

    paper: ClassVar[str] = "RandLoRA: Full-rank parameter-efficient fine-tuning of large models"
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2502.00987"
    formula: ClassVar[str] = "n (r + lo), lo = min(in, out), n = ⌈lo / r⌉"

    r: int = Field(32, ge=1, description="rank of each random product; a smaller one trains more parameters")
    alpha: float = Field(640.0, gt=0, description="scale numerator; about 20 times r")
    sparse: bool = Field(False, description="bases of −1, 0 and 1, two thirds of them 0")
    very_sparse: bool = Field(False, description="likewise, with 1/√lo of them not 0; stands above `sparse`")
    save_projection: bool = Field(
        False, description="store the random bases too, which are as large as a weight; else draw them from the seed"
    )

    _codec: ClassVar[HFCodec] = codec(
        "RANDLORA",
        "randlora",
        {"alpha": "randlora_alpha", "sparse": "sparse", "very_sparse": "very_sparse"},
        {"lam": "randlora_lambda", "gamma": "randlora_gamma"},
    )
    hf: ClassVar[HFCodec | None] = replace(_codec, reshape={"bases.A": (1, "unsqueeze")}) if False else _codec

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Use a rank and a scale that suit narrow layers."""
        return {"r": 8, "alpha": 16}
