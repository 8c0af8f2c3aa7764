"""Rotating and scaling pairs of a layer's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.errors import AttachError
from adapterlab.registry import register


@register
class RoAd(LayerMethod):
    """Rotate and scale pairs of a layer's outputs by learned angles and factors.

    y = c ⊙ h + t ⊙ ĥ, with h = W x + b `[out]`, ĥ: (h_i, h_j) → (−h_j, h_i) for each pair, c = α cos θ, t = α sin θ.
    Pairs are i and i + g/2 inside groups of g outputs.

    Variants: `road_1` has one θ and α for each pair, `road_2` for each output, `road_4` for each output one for c and
    another for t.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too).

    Start: θ = 0 and α = 1, so the first output equals the base's.

    Trainable parameters: out, 2 out or 4 out for each module, by variant.

    Inference: can be merged, at no cost. Adapters in one batch cost elementwise products only.

    Rate: 3e-3, as in the authors' runs. α is not decayed, which would pull it to 0 and with it the layer's output.

    Reference: "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", arXiv
    2409.00119.

    Example:
        >>> from adapterlab.methods.multiplicative.road import RoAd
        >>> RoAd(variant="road_2", targets=["q", "v"]).group(192)
        64
    """

    formula: ClassVar[str] = "out (road_1), 2 out (road_2), 4 out (road_4)"

    variant: Literal["road_1", "road_2", "road_4"] = Field(
        "road_1", description="angles and factors for each pair, each output, or twice for each output"
    )
    group_size: int = Field(
        64,
        ge=2,
        description="outputs a group; it divides the outputs of every target",
    )

    hf: ClassVar[HFCodec | None] = HFCodec(
        "ROAD",
        fields={"variant": "variant", "group_size": "group_size"},
        tensors={"theta": "road_theta", "alpha": "road_alpha"},
        transposed=False,
        accepts={"init_weights": (True, False)},
    )

    @field_validator("group_size")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"a group is made of pairs; use {value + 1}")
        return value

    def group(self, out: int) -> int:
        """Outputs in a group of a layer with `out` outputs.

        Raises:
            AttachError: they do not divide into groups.
        """
        fitting = math.gcd(self.group_size, out)
        if fitting != self.group_size:
            advice = f"group_size={fitting} fits it" if fitting % 2 == 0 else "pairs need an even number: exclude it"
            raise AttachError(f"RoAd: group_size={self.group_size} does not divide a target's {out} outputs; {advice}.")
        return fitting

    def tensor_options(self) -> Mapping[str, Mapping[str, Any]]:
        """α starts at one and is not decayed."""
        return {"alpha": {"weight_decay": 0.0}}

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Groups that fit narrow layers."""
        return {"group_size": 8}

    class Layer(Adapter):
        """Angles and factors of one module."""

        def __init__(self, method: RoAd, site: Site):
            super().__init__(site)
            out, _ = site.shape
            self.variant, self.size = method.variant, method.group(out)
            count = {"road_1": out // 2, "road_2": out, "road_4": 2 * out}[method.variant]
            self.theta, self.alpha = site.parameter(count), site.parameter(count)
            nn.init.ones_(self.alpha)

        def turns(self) -> tuple[Tensor, Tensor]:
            """The factors c and t, each `[groups, 2, size / 2]`."""
            # The stored order is group after group: (1 or) 2 halves of c, then for `road_4` those of t.
            shape = (-1, {"road_1": 1, "road_2": 2, "road_4": 4}[self.variant], self.size // 2)
            theta, alpha = self.theta.view(shape), self.alpha.view(shape)
            c, t = alpha * theta.cos(), alpha * theta.sin()
            return (c[:, :2], t[:, 2:]) if self.variant == "road_4" else (c, t)

        def around(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Rotate and scale what `run` returns."""
            y: Tensor = run(x, *args, **kwargs)
            c, t = self.turns()
            half = self.size // 2
            scaled = (c - 1).expand(-1, 2, half).flatten()  # near 1, half precision would lose what was learned
            swapped = torch.cat([-t[:, :1], t[:, -1:]], 1).flatten()
            turned: Tensor = _Turn.apply(y, scaled, swapped, half)
            return turned


class _Turn(torch.autograd.Function):
    """y + d ∘ y + t ∘ J y, where J swaps the halves of each group: in the dtype of y, keeping y alone."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, d: Tensor, t: Tensor, half: int) -> Tensor:
        ctx.save_for_backward(y, d, t)
        ctx.half = half
        return torch.addcmul(y, y, d.to(y.dtype)).addcmul_(_swapped(y, half), t.to(y.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, d, t = ctx.saved_tensors
        gy = gd = gt = None
        if ctx.needs_input_grad[0]:
            gy = torch.addcmul(grad, grad, d.to(grad.dtype)).add_(_swapped(grad * t.to(grad.dtype), ctx.half))
        if ctx.needs_input_grad[1]:
            gd = (grad * y).reshape(-1, y.shape[-1]).sum(0, dtype=d.dtype)
        if ctx.needs_input_grad[2]:
            gt = (grad * _swapped(y, ctx.half)).reshape(-1, y.shape[-1]).sum(0, dtype=t.dtype)
        return gy, gd, gt, None


def _swapped(y: Tensor, half: int) -> Tensor:
    """The halves of each group in the other order."""
    h = y.unflatten(-1, (-1, 2, half))
    return torch.cat([h[..., 1:, :], h[..., :1, :]], -2).flatten(-3)
