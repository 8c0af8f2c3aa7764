"""Vector-based random matrix adaptation."""

from __future__ import annotations

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
class VeRA(RandomBases):
    """One frozen random pair (A, B) for all modules; each module learns two scaling vectors.

    y = W x + b + λ_b ⊙ B (λ_d ⊙ A x), with A `[r, in]` and B `[out, r]` cut out of tensors of the largest module's
    size, λ_d `[r]` and λ_b `[out]`. r is large, because it costs little storage.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too). A depends on the widest of the targets,
    so other targets have other bases.

    Start: λ_b = 0 and λ_d = `d_initial`, so the first output equals the base's.

    Trainable parameters: out + r for each module.

    Inference: can be merged, at no cost; unmerged it costs what a LoRA of the same rank does.

    Rate: 5e-3, ten times LoRA's, between the 4e-3 and 1e-2 of its runs on GLUE.

    Reference: "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454.

    Example:
        >>> from adapterlab.methods.structured.vera import VeRA
        >>> VeRA(r=16).draw(out=8, in_=4)[0].shape
        torch.Size([16, 4])
    """

    formula: ClassVar[str] = "out + r"

    r: int = Field(256, ge=1, description="rank of the random pair")
    d_initial: float = Field(0.1, description="start of λ_d; 0.1 or less")

    hf: ClassVar[HFCodec | None] = codec(
        "VERA", "vera", {"d_initial": "d_initial"}, {"b": "vera_lambda_b", "d": "vera_lambda_d"}
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Use a rank below the width."""
        return {"r": 8}

    def draw(self, out: int, in_: int) -> tuple[Tensor, Tensor]:
        """Uniform in ±√(6 / fan in); A first."""
        generator = seeded(self.seed)
        a, b = torch.empty(self.r, in_), torch.empty(out, self.r)
        return nn.init.kaiming_uniform_(a, generator=generator), nn.init.kaiming_uniform_(b, generator=generator)

    class Layer(SlicedDelta):
        """The two vectors at one module."""

        def __init__(self, method: VeRA, site: Site):
            super().__init__(method, site)
            self.b, self.d = site.parameter(site.shape[0]), site.parameter(method.r)
            nn.init.constant_(self.d, method.d_initial)

        def slices(self) -> tuple[Tensor, Tensor]:
            """This module's A and B."""
            out, in_ = self.site.shape
            return self.bases.A[:, :in_].to(self.d.device), self.bases.B[:out].to(self.b.device)

        def factors(self) -> tuple[Tensor, Tensor]:
            """The factors of an ordinary LoRA that does the same, with scale one."""
            a, b = self.slices()
            return self.d[:, None] * a, self.b[:, None] * b

        def forward(self, x: Tensor) -> Tensor:
            """λ_b ⊙ B (λ_d ⊙ A x) in the dtype of x."""
            a, b = self.slices()
            if autocasts(x):  # a node with its own backward must not see dtypes change
                h = self.site.op(x, a) * self.d
                return self.site.mix(h, b) * self.b
            y: Tensor = _Scaled.apply(x, a, b, self.d, self.b)
            return y


class _Scaled(torch.autograd.Function):
    """λ_b ⊙ B (λ_d ⊙ A x), which keeps A x `[..., r]` alone; neither x nor scaled copies of the bases."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, d: Tensor, out: Tensor) -> Tensor:
        h = x.reshape(-1, x.shape[-1]) @ a.to(x.dtype).T
        ctx.save_for_backward(h, a, b, d, out)
        y = (h * d.to(x.dtype)) @ b.to(x.dtype).T
        return unfolded(y.mul_(out.to(x.dtype)), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, a, b, d, out = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        b, low = b.to(g.dtype), d.to(g.dtype)
        grad_out = ((h * low) @ b.T).mul_(g).sum(0, dtype=out.dtype)
        gh = (g * out.to(g.dtype)) @ b
        grad_d = (gh * h).sum(0, dtype=d.dtype)
        gx = (gh * low) @ a.to(g.dtype) if ctx.needs_input_grad[0] else None
        return None if gx is None else gx.view(*grad.shape[:-1], -1), None, None, grad_d, grad_out
