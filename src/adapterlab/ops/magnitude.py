"""A weight split into row norms and directions, with a low-rank update of the directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adapterlab.ops.low_rank import low_rank, thin_added, unfolded
from adapterlab.ops.operator import operator


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float, squares: Tensor | None = None) -> Tensor:
    """Compute the Euclidean norms of the rows of W + scale · B A without forming the product.

    c² = ‖W_i‖² + 2 scale · B_i · (W Aᵀ)_i + scale² · B_i (A Aᵀ) B_iᵀ: the cost is one thin product with W.

    Args:
        weight: W `[out, in]`.
        a: A `[r, in]`.
        b: B `[out, r]`.
        scale: factor of the update.
        squares: ‖W_i‖² from `row_squares`, if they are known already.

    Returns:
        `[out]`, positive, in the dtype of the factors or float32, whichever is wider; without gradient.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    # W is not copied to the wider dtype: the thin product is a correction, and enters the outputs rounded like this.
    cross = (weight @ a.to(weight.dtype).T).to(dtype)
    a, b = a.to(dtype), b.to(dtype)
    change = (b * torch.addmm(cross, b, a @ a.T, beta=2 * scale, alpha=scale**2)).sum(1)
    squares = (row_squares(weight, dtype) if squares is None else squares) + change
    # A row of zeros has no direction; a positive norm keeps its share at zero instead of 0 / 0.
    return squares.clamp_min(torch.finfo(dtype).tiny).sqrt()


@torch.no_grad()
def row_squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the squared norms of the rows of W `[out]`, in the given dtype."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()


def magnitude_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    gain: Tensor,
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Compute y = gain ⊙ (x Wᵀ + scale · (x Aᵀ) Bᵀ) + bias with a frozen W, in one autograd node.

    The gain enters as its difference from one, so that a small change survives in a half-precision dtype, and a gain of
    one gives the base's output to the bit.

    Kept for the backward pass are x, x Aᵀ and the product before the gain. The last could be had back from y, which
    the next layer may keep anyway, but a gain near zero destroys it, and models may change y in place.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`, may be a transposed view; gets no gradient.
        bias: `[out]` or None.
        a: A `[r, in]`.
        b: B `[out, r]`.
        scale: factor of the update.
        gain: `[out]`.
        again: makes `weight` once more for the backward pass, so that a weight unpacked for this call is not kept.

    Returns:
        `[..., out]` in x's dtype.
    """
    y: Tensor = _MagnitudeLinear.apply(x, weight, bias, a, b, scale, gain, again)
    return y


def _fake_magnitude(x: Tensor, weight: Tensor, bias: Any, a: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = (len(x), len(weight))
    return x.new_empty(wide), x.new_empty(wide), x.new_empty(len(x), len(a))


@operator(
    "magnitude(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, Tensor gain)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_magnitude,
)
def magnitude(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, the product z before the gain (its bias included) and x Aᵀ, for x `[tokens, in]`."""
    z, h = low_rank(x, weight, bias, a, b, scale, 0.0, None)
    change = (gain - 1).to(x.dtype)
    y = torch.addcmul(z, z, change)
    return (y if bias is None else y.sub_(change * bias.to(x.dtype))), z, h


class _MagnitudeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        gain: Tensor,
        again: Callable[[], Tensor] | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, z, h = magnitude(flat, weight, bias, a, b, scale, gain)
        need_a, need_b, _, need_gain = ctx.needs_input_grad[3:7]
        held = (t if need else None for t, need in ((flat, need_a), (h, need_b), (z, need_gain), (weight, not again)))
        ctx.save_for_backward(*held, bias, a, b, gain)
        ctx.scale, ctx.again = scale, again
        return unfolded(y, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, h, z, weight, bias, a, b, gain = ctx.saved_tensors
        need_x, _, need_bias, need_a, need_b, _, need_gain, _ = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1])
        gx = ga = gb = gbias = ggain = None
        # The gain goes to the thin factors and to the weight, which are smaller than the gradient.
        rows = gain.to(dy.dtype)[:, None]
        if need_gain:
            # Wider sums copy what they add; they are needed only where the bias is subtracted from them.
            ggain = (dy * z).sum(0) if bias is None else (dy * z).sum(0, dtype=gain.dtype)
        if need_x or need_a:
            gh = (dy @ (b.to(dy.dtype) * rows)).mul_(ctx.scale)
            if need_x:
                weight = ctx.again() if ctx.again else weight
                gx = thin_added(dy @ (weight * rows), gh, a).view(*grad.shape[:-1], a.shape[1])
            if need_a:
                ga = (gh.T @ flat).to(a.dtype)
        if need_b:
            gb = (dy.T @ h).mul_(ctx.scale * rows).to(b.dtype)
        if bias is not None and (need_bias or need_gain):
            total = dy.sum(0, dtype=gain.dtype)
            gbias = total.to(bias.dtype) if need_bias else None
            ggain = ggain - bias * total if need_gain else None
        return gx, None, gbias, ga, gb, None, ggain, None
