"""A frozen linear layer and a low-rank update of it, in one autograd node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ with a frozen W.

    The node keeps only x Aᵀ (and x, if A trains) for the backward pass, adds in place, and never copies x to another
    dtype: the factors are cast to x's dtype instead, and their gradients come back in their own.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`, may be a transposed view; gets no gradient.
        bias: `[out]` or None; gets no gradient.
        a: A `[r, in]`.
        b: B `[out, r]`.
        scale: factor of the update.

    Returns:
        `[..., out]` in x's dtype.
    """
    y: Tensor = _LowRankLinear.apply(x, weight, bias, a, b, scale)
    return y


def autocasts(x: Tensor) -> bool:
    """Say whether autocast would change dtypes inside a product of x; a node with its own backward must not be used."""
    return torch.is_autocast_enabled(x.device.type)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        h = flat @ a.to(x.dtype).T
        y = F.linear(flat, weight, bias)
        y.addmm_(h, b.to(x.dtype).T, alpha=scale)
        need_a, need_b = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(flat if need_a else None, h if need_b else None, weight, a, b)
        ctx.scale = scale
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, h, weight, a, b = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        gh = (g @ b.to(g.dtype)).mul_(ctx.scale)
        need_x, _, _, need_a, need_b, _ = ctx.needs_input_grad
        gx = None
        if need_x:
            gx = (g @ weight).addmm_(gh, a.to(g.dtype)).view(*grad.shape[:-1], weight.shape[1])
        ga = (gh.T @ flat).to(a.dtype) if need_a else None
        gb = (g.T @ h).mul_(ctx.scale).to(b.dtype) if need_b else None
        return gx, None, None, ga, gb, None
