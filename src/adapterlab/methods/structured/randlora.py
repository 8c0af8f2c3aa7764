"""Full-rank updates made of random bases."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.codec import HFCodec
from adapterlab.core.site import Site
from adapterlab.methods.structured._random_bases import RandomBases, SlicedDelta, codec, seeded
from adapterlab.ops.low_rank import autocasts, unfolded
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

    Cost of a step: with many tokens ΔW is formed in both passes and its gradient goes back through B, 6 out in lo
    operations, beside three products with ΔW, 6 t out in; LoRA's large products are 4 t out in for t tokens.

    Rate: 1e-4, as in the authors' scripts for GLUE and for commonsense reasoning.

    Reference: "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv 2502.00987.

    Example:
        >>> from adapterlab.methods.structured.randlora import RandLoRA
        >>> [list(t.shape) for t in RandLoRA(r=8).draw(out=64, in_=48)]
        [[8, 1, 48], [64, 6, 8]]
    """

    formula: ClassVar[str] = "n (r + lo), lo = min(in, out), n = ⌈lo / r⌉"

    r: int = Field(32, ge=1, description="rank of each random product; a smaller one trains more parameters")
    alpha: float = Field(640.0, gt=0, description="scale numerator; about 20 times r")
    sparse: bool = Field(False, description="bases of −1, 0 and 1, two thirds of them 0")
    very_sparse: bool = Field(False, description="likewise, with 1/√lo of them not 0; stands above `sparse`")
    save_projection: bool = Field(
        False, description="store the random bases too, which are as large as a weight; else draw them from the seed"
    )

    hf: ClassVar[HFCodec | None] = codec(
        "RANDLORA",
        "randlora",
        {"alpha": "randlora_alpha", "sparse": "sparse", "very_sparse": "very_sparse"},
        {"lam": "randlora_lambda", "gamma": "randlora_gamma"},
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Use a rank and a scale that suit narrow layers."""
        return {"r": 8, "alpha": 16}

    def draw(self, out: int, in_: int) -> tuple[Tensor, Tensor]:
        """A `[r, 1, lo]` and B `[hi, n, r]` with standard deviation one; A first."""
        low, high = sorted((out, in_))
        generator, count = seeded(self.seed), math.ceil(low / self.r)
        if self.sparse or self.very_sparse:
            share = 1 / (2 * (math.sqrt(low) if self.very_sparse else 3))  # of each sign
            drawn = [torch.rand(shape, generator=generator) for shape in ((self.r, 1, low), (high, count, self.r))]
            a, b = (torch.where(u < share, -1.0, torch.where(u > 1 - share, 1.0, 0.0)) for u in drawn)
        else:
            a = _uniform((self.r, 1, low), generator)
            b = torch.cat([_uniform((high, 1, self.r), generator) for _ in range(count)], dim=1)
        return a / a.std(), b / b.std()

    class Layer(SlicedDelta):
        """The two sets of diagonal factors at one module."""

        def __init__(self, method: RandLoRA, site: Site):
            super().__init__(method, site)
            low, _ = sorted(site.shape)
            count = math.ceil(low / method.r)
            self.scale = method.alpha / method.r
            self.lam, self.gamma = site.parameter(method.r, count), site.parameter(count, low)
            nn.init.constant_(self.gamma, 1 / max(self.gamma.shape))

        def slices(self) -> tuple[Tensor, Tensor]:
            """This module's A `[r, 1, lo]` and β `[hi, n r]`."""
            low, high = sorted(self.site.shape)
            a, b = self.bases.A[..., :low], self.bases.B[:high, : len(self.gamma)].flatten(1)
            return a.to(self.lam.device), b.to(self.lam.device)

        def delta(self) -> Tensor:
            """ΔW `[out, in]`."""
            a, b = self.slices()
            update = self.scale * b @ _scaled(a, self.lam, self.gamma)
            return update if self.turned else update.T

        @property
        def turned(self) -> bool:
            """Whether ΔW is built as `[out, in]` and not as its transpose."""
            out, in_ = self.site.shape
            return out >= in_

        def forward(self, x: Tensor) -> Tensor:
            """ΔW x in the dtype of x."""
            a, b = self.slices()
            if autocasts(x):  # a node with its own backward must not see dtypes change
                return self.site.op(x, self.delta())
            y: Tensor = _Update.apply(x, a, b, self.lam, self.gamma, self.scale, self.turned)
            return y


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform numbers; in bfloat16, because PEFT's are."""
    return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)


def _scaled(a: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    """Λ A Γ `[r n, lo]`: row k n + j is λ_kj A_k ⊙ γ_j."""
    return (lam[:, :, None] * a * gamma).flatten(0, 1)


class _Update(torch.autograd.Function):
    """x ΔWᵀ, which keeps x and the small factors alone: what is as large as the weight is made anew for the gradient.

    With many rows ΔW is formed first, with few they go through the factors one after the other.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, lam: Tensor, gamma: Tensor, scale: float, turned: bool
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat, a, b, lam, gamma)
        ctx.scale, ctx.turned = scale, turned
        v, b = _scaled(a, lam, gamma).to(x.dtype), b.to(x.dtype)
        if _many(flat, b, v):
            update = b @ v
            y = flat @ (update.T if turned else update)
        else:
            y = (flat @ v.T) @ b.T if turned else (flat @ b) @ v
        return unfolded(y.mul_(scale), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, a, b, lam, gamma = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1]) * ctx.scale
        v, b, need_x = _scaled(a, lam, gamma).to(g.dtype), b.to(g.dtype), ctx.needs_input_grad[0]
        if _many(flat, b, v):
            gv = b.T @ (g.T @ flat if ctx.turned else flat.T @ g)
            gx = g @ (b @ v if ctx.turned else (b @ v).T) if need_x else None
        elif ctx.turned:
            gh = g @ b
            gv, gx = gh.T @ flat, gh @ v if need_x else None
        else:
            gv, gx = (flat @ b).T @ g, (g @ v.T) @ b.T if need_x else None
        shared = gv.view(*lam.shape, -1).to(lam.dtype) * a
        glam, ggamma = torch.einsum("kjl,jl->kj", shared, gamma), torch.einsum("kjl,kj->jl", shared, lam)
        return None if gx is None else gx.view(*grad.shape[:-1], -1), None, None, glam, ggamma, None, None


def _many(rows: Tensor, b: Tensor, v: Tensor) -> bool:
    """Whether forming ΔW costs less than two products with the rows."""
    high, low = len(b), v.shape[1]
    return len(rows) * (high + low) > high * low
