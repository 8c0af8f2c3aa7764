"""Experts that are weighed token by token: low-rank updates beside a frozen layer, vectors of scales; and a router."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterlab.ops.low_rank import dropout_mask, kept, unfolded
from adapterlab.ops.operator import operator


def routed_low_rank(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    router: Tensor,
    shift: Tensor | None = None,
    *,
    scale: float = 1.0,
    top_k: int | None = None,
    renormalised: bool = False,
    p: float = 0.0,
    dtype: torch.dtype | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    again: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute y = x Wᵀ + bias + scale · Σ_e w_e B_e A_e drop(x) with a frozen W, or the sum alone.

    w = `mixture`(z) of the scores z = x Rᵀ + shift. A weight of one token commutes with B_e, so all A_e are one product
    and all B_e another, with the weights between: (w ⊙ (x Aᵀ)) Bᵀ, A `[E r, in]`, B `[out, E r]`. With few experts for
    each token those left out count 0: to gather the tokens of each expert takes longer on a CPU (see the benchmarks).

    The node keeps x, x Aᵀ and w, and z where some weights are cut. Scores and weights are in the router's dtype. In the
    backward pass the router is E more rows of A: its gradient and its share of that of x come from the products of A,
    in their dtype. The mask of the dropout is drawn again from its seed.

    Args:
        x: `[..., in]`.
        a: A `[E, r, in]`.
        b: B `[E, out, r]`.
        router: R `[E, in]`.
        shift: `[E]` or None.
        scale: factor of the updates.
        top_k: experts that a token uses; None: all.
        renormalised: see `mixture`.
        p: share of the elements of x that the updates do not see; the others are divided by 1 − p.
        dtype: of the products and of y; default: that of x.
        weight: W `[out, in]`, may be a transposed view; gets no gradient. None: without x Wᵀ and bias.
        bias: `[out]` or None.
        again: makes `weight` once more for the backward pass, so that a weight unpacked for this call is not kept.

    Returns:
        y `[..., out]` and z `[..., E]`, which may be used for losses.
    """
    seed = torch.randint(2**62, (), device="cpu") if p else None
    form = (dtype or x.dtype, scale, top_k or 0, renormalised, p, seed)
    y, z = _RoutedLowRank.apply(x, a, b, router, shift, bias, weight, again, *form)
    return y, z


def selection(z: Tensor, top_k: int | None) -> Tensor | None:
    """Say which experts each token uses, those with the largest scores: `[..., E]`, or None for all."""
    if not top_k:
        return None
    return torch.zeros_like(z, dtype=torch.bool).scatter_(-1, z.topk(top_k, -1).indices, True)


def mixture(z: Tensor, chosen: Tensor | None, renormalised: bool) -> Tensor:
    """Return weights of experts: softmax over all, of which those not chosen count 0, or over the chosen ones alone.

    Args:
        z: scores `[..., E]`.
        chosen: which are used, or None.
        renormalised: the weights of those sum to one.
    """
    if chosen is None:
        return z.softmax(-1)
    if renormalised:
        return z.masked_fill(~chosen, -math.inf).softmax(-1)
    return z.softmax(-1).masked_fill(~chosen, 0)


def scores(x: Tensor, router: Tensor, shift: Tensor | None = None) -> Tensor:
    """Compute x Rᵀ + shift in the dtype of R `[E, in]`, for x `[..., in]` in any dtype; keeps x as it came."""
    z: Tensor = _Scores.apply(x, router)
    return z if shift is None else z + shift


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


def _below(a: Tensor) -> Tensor:
    """See A `[E, r, in]` as `[E r, in]`."""
    return a.flatten(0, 1)


def _beside(b: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay B `[E, out, r]` out as `[out, E r]`."""
    return b.to(dtype).transpose(0, 1).flatten(1)


def _spread(w: Tensor, h: Tensor) -> Tensor:
    """Repeat the weights `[tokens, E]` for the columns of each expert, in the shape and dtype of h `[tokens, E r]`."""
    return w.to(h.dtype).repeat_interleave(h.shape[1] // w.shape[1], 1)


def _product(x: Tensor, router: Tensor, shift: Tensor | None = None) -> Tensor:
    z = x.to(router.dtype) @ router.T
    return z if shift is None else z.add_(shift)


def _fake(x: Tensor, a: Tensor, b: Tensor, router: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    low, z = x.new_empty(0, dtype=rest[3]), router.new_empty(len(x), len(router))
    return low.new_empty(len(x), b.shape[1]), low.new_empty(len(x), a.shape[0] * a.shape[1]), z, torch.empty_like(z)


@operator(
    "routed_low_rank(Tensor x, Tensor a, Tensor b, Tensor router, Tensor? shift, Tensor? bias, Tensor? weight,"
    " ScalarType dtype, float scale, int top_k, bool renormalised, float p, Tensor? seed)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def routed(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    router: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype,
    scale: float,
    top_k: int,
    renormalised: bool,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute y, the thin product drop(x) Aᵀ, without its factor 1 / (1 − p), z and w, for x `[tokens, in]`."""
    z, low = _product(x, router, shift), x.to(dtype)
    h = (low if seed is None else low * dropout_mask(low, low.shape[1], p, seed)) @ _below(a).to(dtype).T
    w = mixture(z, selection(z, top_k), renormalised)
    thin, wide = h * _spread(w, h), _beside(b, dtype).T
    if weight is None:
        return (thin @ wide).mul_(scale / kept(p)), h, z, w
    y = F.linear(low, weight, None if bias is None else bias.to(dtype))
    return y.addmm_(thin, wide, alpha=scale / kept(p)), h, z, w


class _RoutedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        router: Tensor,
        shift: Tensor | None,
        bias: Tensor | None,
        weight: Tensor | None,
        again: Callable[[], Tensor] | None,
        dtype: torch.dtype,
        scale: float,
        top_k: int,
        renormalised: bool,
        p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        y, h, z, w = routed(flat, a, b, router, shift, bias, weight, dtype, scale, top_k, renormalised, p, seed)
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        cut = z if top_k and not renormalised else None  # weights that do not tell the softmax they were taken from
        ctx.save_for_backward(flat if trained else None, h, cut, w, None if again else weight, a, b, router, seed)
        ctx.scale, ctx.p, ctx.again, ctx.x_dtype = scale / kept(p), p, again, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return unfolded(y, x), unfolded(z, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        flat, h, cut, w, weight, a, b, router, seed = ctx.saved_tensors
        need_x, need_a, need_b, need_router, need_shift, need_bias = ctx.needs_input_grad[:6]
        g, spread = grad.reshape(-1, grad.shape[-1]), _spread(w, h)
        gh = (g @ _beside(b, g.dtype)).mul_(ctx.scale)
        gz = _into_scores(gh * h, w, w if cut is None else cut.softmax(-1)).add_(grad_z.reshape(w.shape))
        gh = gh.mul_(spread)
        gx = ga = gb = grouter = None
        mask = None if seed is None else dropout_mask(g, a.shape[-1], ctx.p, seed)
        if need_x:
            weight = ctx.again() if ctx.again else weight
            gx = g.new_zeros(len(g), a.shape[-1]) if weight is None else g @ weight
            gx = _into_input(gx, gh, gz, a, router, mask).to(ctx.x_dtype).view(*grad.shape[:-1], a.shape[-1])
        if need_a or need_router:
            ga, grouter = _into_rows(flat.to(g.dtype), gh, gz, mask)
            ga, grouter = ga.to(a.dtype).view(a.shape), grouter.to(router.dtype)
        if need_b:
            wide = (g.T @ (h * spread)).mul_(ctx.scale)
            gb = wide.to(b.dtype).unflatten(1, (len(b), -1)).transpose(0, 1)
        sums = gz.sum(0) if need_shift else None, g.sum(0).to(ctx.bias_dtype) if need_bias else None
        return gx, ga if need_a else None, gb, grouter if need_router else None, *sums, *(None,) * 8


def _into_scores(parts: Tensor, w: Tensor, shares: Tensor) -> Tensor:
    """The gradient of the scores: what reaches one weight, less its share of what reaches all.

    The shares are those of the softmax, which are not the weights where some of them were set to 0 afterwards.

    Args:
        parts: of the gradients of the weights `[tokens, E r]`, to be summed over the columns of each expert.
        w: the weights `[tokens, E]`.
        shares: likewise.
    """
    gw = parts.unflatten(1, (w.shape[1], -1)).sum(-1, dtype=w.dtype).mul_(w)
    return gw.addcmul_(shares, gw.sum(-1, keepdim=True), value=-1)


def _into_input(wide: Tensor, gh: Tensor, gz: Tensor, a: Tensor, router: Tensor, mask: Tensor | None) -> Tensor:
    """Add gh A, where the mask has ones, and gz R to `wide` in place."""
    a, router, gz = (t.to(wide.dtype) for t in (_below(a), router, gz))
    if mask is None:
        return wide.addmm_(torch.cat([gh, gz], 1), torch.cat([a, router]))
    return wide.addcmul_(gh @ a, mask).addmm_(gz, router)


def _into_rows(x: Tensor, gh: Tensor, gz: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of A `[E r, in]` and R `[E, in]`."""
    gz = gz.to(x.dtype)
    if mask is None:
        rows = torch.cat([gh, gz], 1).T @ x
        return rows[: gh.shape[1]], rows[gh.shape[1] :]
    return gh.T @ (x * mask), gz.T @ x


class _Scores(torch.autograd.Function):
    """X Rᵀ in the dtype of R, which keeps x as it came: its copy in that dtype is made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor) -> Tensor:
        ctx.save_for_backward(x, router)
        return _product(x, router)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, router = ctx.saved_tensors
        need_x, need_router = ctx.needs_input_grad
        low, rows = grad.to(x.dtype), x.reshape(-1, x.shape[-1])
        grouter = (low.reshape(-1, grad.shape[-1]).T @ rows).to(router.dtype) if need_router else None
        return low @ router.to(x.dtype) if need_x else None, grouter


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
