"""A weight split into row norms and directions, with a low-rank update of the directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute the Euclidean norms of the rows of W + scale · B A without forming the product.

    c² = ‖W_i‖² + 2 scale · B_i · (W Aᵀ)_i + scale² · B_i (A Aᵀ) B_iᵀ: the cost is one thin product with W.

    Args:
        weight: W `[out, in]`.
        a: A `[r, in]`.
        b: B `[out, r]`.
        scale: factor of the update.

    Returns:
        `[out]`, positive, in the dtype of the factors or float32, whichever is wider; without gradient.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    # W is not copied to the wider dtype: the thin product is a correction, and enters the outputs rounded like this.
    cross = (weight @ a.to(weight.dtype).T).to(dtype)
    a, b = a.to(dtype), b.to(dtype)
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
    squares += (b * torch.addmm(cross, b, a @ a.T, beta=2 * scale, alpha=scale**2)).sum(1)
    # A row of zeros has no direction; a positive norm keeps its share at zero instead of 0 / 0.
    return squares.clamp_min(torch.finfo(dtype).tiny).sqrt()


def magnitude_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, gain: Tensor
) -> Tensor:
    """Compute y = gain ⊙ (x Wᵀ + scale · (x Aᵀ) Bᵀ) + bias with a frozen W, in one autograd node.

    The gain enters as its difference from one, so that a small change survives in a half-precision dtype, and a gain of
    one gives the base's output to the bit.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`, may be a transposed view; gets no gradient.
        bias: `[out]` or None; gets no gradient.
        a: A `[r, in]`.
        b: B `[out, r]`.
        scale: factor of the update.
        gain: `[out]`.

    Returns:
        `[..., out]` in x's dtype.
    """
    y: Tensor = _MagnitudeLinear.apply(x, weight, bias, a, b, scale, gain)
    return y


class _MagnitudeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, gain: Tensor
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        h = flat @ a.to(x.dtype).T
        z = F.linear(flat, weight, bias)
        z.addmm_(h, b.to(x.dtype).T, alpha=scale)
        change = (gain - 1).to(x.dtype)
        y = torch.addcmul(z, z, change)
        if bias is not None:
            y.sub_(change * bias)
        ctx.save_for_backward(flat, h, z, weight, bias, a, b, gain)
        ctx.scale = scale
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, h, z, weight, bias, a, b, gain = ctx.saved_tensors
        need_x, _, _, need_a, need_b, _, need_gain = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1])
        g = torch.addcmul(dy, dy, (gain - 1).to(dy.dtype))
        gh = (g @ b.to(g.dtype)).mul_(ctx.scale)
        gx = ga = gb = ggain = None
        if need_x:
            gx = (g @ weight).addmm_(gh, a.to(g.dtype)).view(*grad.shape[:-1], weight.shape[1])
        if need_a:
            ga = (gh.T @ flat).to(a.dtype)
        if need_b:
            gb = (g.T @ h).mul_(ctx.scale).to(b.dtype)
        if need_gain:
            ggain = (dy * z).sum(0, dtype=gain.dtype)
            if bias is not None:
                ggain -= bias * dy.sum(0, dtype=gain.dtype)
        return gx, None, None, ga, gb, None, ggain
