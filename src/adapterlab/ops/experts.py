"""Experts that are weighed token by token: low-rank updates beside a frozen layer, vectors of scales; and a router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterlab.ops.low_rank import dropout_mask, kept, thin_added, unfolded
from adapterlab.ops.operator import operator


def weighted_low_rank(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float = 0.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Compute y = x Wᵀ + bias + scale · Σ_e w_e B_e A_e drop(x) with a frozen W, or the sum alone.

    A weight of one token commutes with B_e, so all A_e are one product and all B_e another, with the weights between:
    (w ⊙ (x Aᵀ)) Bᵀ, A `[E r, in]`, B `[out, E r]`. The node keeps x, x Aᵀ and the weights; x is never copied to another
    dtype, and what is as wide as x or y is added in place. The mask of the dropout is drawn again from its seed.

    Args:
        x: `[..., in]`.
        w: `[..., E]`, in any dtype.
        a: A `[E, r, in]`.
        b: B `[E, out, r]`.
        scale: factor of the updates.
        p: share of the elements of x that the updates do not see; the others are divided by 1 − p.
        weight: W `[out, in]`, may be a transposed view; gets no gradient. None: without x Wᵀ and bias.
        bias: `[out]` or None.
        again: makes `weight` once more for the backward pass, so that a weight unpacked for this call is not kept.

    Returns:
        `[..., out]` in x's dtype.
    """
    seed = torch.randint(2**62, (), device="cpu") if p else None
    y: Tensor = _WeightedLowRank.apply(x, w, a, b, weight, bias, scale, p, seed, again)
    return y


def scores(x: Tensor, router: Tensor) -> Tensor:
    """Compute x Rᵀ in the dtype of R for x `[..., in]` in any dtype and R `[E, in]`; keeps x as it came."""
    z: Tensor = _Scores.apply(x, router)
    return z


def weighted_scales(u: Tensor, w: Tensor, scales: Tensor) -> Tensor:
    """Compute u + u ⊙ Σ_e w_e (l_e − 1), which keeps u and w and makes the sum again for the backward pass.

    Where the weights sum to one it is u ⊙ Σ_e w_e l_e, but small changes of the scales survive in half precision.

    Args:
        u: `[..., heads, width]`.
        w: `[..., heads, E]`.
        scales: l `[E, heads, width]`.

    Returns:
        As u.
    """
    y: Tensor = _WeightedScales.apply(u, w, scales)
    return y


def below(a: Tensor) -> Tensor:
    """See A `[E, r, in]` as `[E r, in]`."""
    return a.flatten(0, 1)


def beside(b: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay B `[E, out, r]` out as `[out, E r]`."""
    return b.to(dtype).transpose(0, 1).flatten(1)


def weighed(h: Tensor, w: Tensor) -> Tensor:
    """Multiply the blocks of r columns of h `[tokens, E r]` by w `[tokens, E]`."""
    return (h.unflatten(1, (w.shape[1], -1)) * w.to(h.dtype).unsqueeze(-1)).flatten(1)


def _fake(x: Tensor, w: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), b.shape[1]), x.new_empty(len(x), a.shape[0] * a.shape[1])


@operator(
    "weighted_low_rank(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? weight, Tensor? bias, float scale, float p,"
    " Tensor? seed) -> (Tensor, Tensor)",
    _fake,
)
def weighted(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute y and the thin product drop(x) Aᵀ, without its factor 1 / (1 − p), for x `[tokens, in]`."""
    h = (x if seed is None else x * dropout_mask(x, x.shape[1], p, seed)) @ below(a).to(x.dtype).T
    thin, wide = weighed(h, w), beside(b, x.dtype).T
    if weight is None:
        return (thin @ wide).mul_(scale / kept(p)), h
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y.addmm_(thin, wide, alpha=scale / kept(p)), h


class _WeightedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        p: float,
        seed: Tensor | None,
        again: Callable[[], Tensor] | None,
    ) -> Tensor:
        flat, rows = x.reshape(-1, x.shape[-1]), w.reshape(-1, w.shape[-1])
        y, h = weighted(flat, rows, a, b, weight, bias, scale, p, seed)
        _, need_w, need_a, need_b = ctx.needs_input_grad[:4]
        held = None if again else weight
        ctx.save_for_backward(flat if need_a else None, h if need_w or need_b else None, rows, held, a, b, seed)
        ctx.scale, ctx.p, ctx.again = scale / kept(p), p, again
        ctx.bias_dtype = None if bias is None else bias.dtype
        return unfolded(y, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, h, w, weight, a, b, seed = ctx.saved_tensors
        need_x, need_w, need_a, need_b, _, need_bias = ctx.needs_input_grad[:6]
        g = grad.reshape(-1, grad.shape[-1])
        gx = gw = ga = gb = gbias = None
        if need_x or need_w or need_a:
            gh = (g @ beside(b, g.dtype)).mul_(ctx.scale)
            if need_w:
                gw = _by_expert(gh, h, w).view(*grad.shape[:-1], -1)
            gh = weighed(gh, w)
            mask = None if seed is None else dropout_mask(g, a.shape[-1], ctx.p, seed)
            if need_x:
                weight = ctx.again() if ctx.again else weight
                wide = g.new_zeros(len(g), a.shape[-1]) if weight is None else g @ weight
                gx = thin_added(wide, gh, below(a), mask).view(*grad.shape[:-1], -1)
            if need_a:
                ga = (gh.T @ (flat if mask is None else flat * mask)).to(a.dtype).view(a.shape)
        if need_b:
            wide = (g.T @ weighed(h, w)).mul_(ctx.scale)
            gb = wide.to(b.dtype).unflatten(1, (len(b), -1)).transpose(0, 1)
        if need_bias:
            gbias = g.sum(0).to(ctx.bias_dtype)
        return gx, gw, ga, gb, None, gbias, None, None, None, None


def _by_expert(one: Tensor, other: Tensor, w: Tensor) -> Tensor:
    """Sum the products of two `[tokens, E r]` over the columns of each expert: `[tokens, E]` in the dtype of w."""
    return (one * other).unflatten(1, (w.shape[1], -1)).sum(-1, dtype=w.dtype)


class _Scores(torch.autograd.Function):
    """X Rᵀ in the dtype of R, which keeps x as it came: its copy in that dtype is made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor) -> Tensor:
        ctx.save_for_backward(x, router)
        return x.to(router.dtype) @ router.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, router = ctx.saved_tensors
        need_x, need_router = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grouter = rows.T @ x.reshape(-1, x.shape[-1]).to(router.dtype) if need_router else None
        return (grad @ router).to(x.dtype) if need_x else None, grouter


class _WeightedScales(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, w: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(u, w, scales)
        return torch.addcmul(u, u, _change(w, scales, u.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, w, scales = ctx.saved_tensors
        need_u, need_w, need_scales = ctx.needs_input_grad
        gu = torch.addcmul(grad, grad, _change(w, scales, u.dtype)) if need_u else None
        if not need_w and not need_scales:
            return gu, None, None
        gm = grad * u
        gw = torch.einsum("...hd,ehd->...he", gm, (scales - 1).to(gm.dtype)).to(w.dtype) if need_w else None
        rows, weights = (t.reshape(-1, *t.shape[-2:]) for t in (gm, w.to(gm.dtype)))
        gl = torch.einsum("the,thd->ehd", weights, rows).to(scales.dtype) if need_scales else None
        return gu, gw, gl


def _change(w: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_e w_e (l_e − 1): `[..., heads, width]`."""
    return torch.einsum("...he,ehd->...hd", w.to(dtype), (scales - 1).to(dtype))
