"""A frozen linear layer and a low-rank update of it, in one autograd node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from adapterlab.ops.operator import operator

_LEVELS = 2**16  # probabilities of dropout are multiples of 1 / _LEVELS: a drawn word of 64 bits serves four elements


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float = 0.0,
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Compute y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ with a frozen W.

    The node keeps only drop(x) Aᵀ (and x, if A trains) for the backward pass, adds in place, and never copies x to
    another dtype: the factors are cast to x's dtype instead, and their gradients come back in their own. The mask of
    the dropout is not kept: the backward pass draws it again from its seed, which comes from the global generator of
    the CPU.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`, may be a transposed view; gets no gradient.
        bias: `[out]` or None.
        a: A `[r, in]`.
        b: B `[out, r]`.
        scale: factor of the update.
        p: share of the elements of x that the update does not see; the others are divided by 1 − p.
        again: makes `weight` once more for the backward pass, so that a weight unpacked for this call is not kept.

    Returns:
        `[..., out]` in x's dtype.
    """
    seed = _seed() if p else None
    y: Tensor = _LowRankLinear.apply(x, weight, bias, a, b, scale, p, seed, again)
    return y


def _seed(generator: torch.Generator | None = None) -> Tensor:
    return torch.randint(2**62, (), generator=generator, device="cpu")


FEW, FEW_OF_A_ROW = 64, 16  # tokens


def thin_dtype(x: Tensor, few: int = FEW, rows: int = 1) -> torch.dtype:
    """Return the dtype in which products of x with thin factors are fastest.

    In half precision on a CPU a small product takes 40 µs whatever it multiplies, four times what float32 takes.

    Args:
        x: `[..., in]`.
        few: tokens of a product up to which that counts.
        rows: that have factors of their own, so that there are as many products.
    """
    half = x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu"
    return torch.float32 if half and x.numel() <= few * rows * x.shape[-1] else x.dtype


def add_low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, inner: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Add scale · inner(x Aᵀ) Bᵀ to y in place, without a gradient.

    Args:
        y: `[tokens, out]`.
        x: `[tokens, in]` in y's dtype.
        a: Aᵀ `[in, r]`, in `thin_dtype`.
        b: Bᵀ `[r, out]`, likewise.
        scale: factor of the update.
        inner: what is computed between the products, `[tokens, r]` of as many; None: nothing.
    """
    h = x.to(a.dtype).mm(a)
    h = h if inner is None else inner(h)
    if a.dtype is x.dtype:
        y.addmm_(h, b, alpha=scale)
    else:
        y.add_(h.mm(b), alpha=scale)


def add_low_rank_by_row(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `low_rank_by_row` to y `[rows, tokens, out]` in place; a and b are in `thin_dtype`."""
    if a.dtype is x.dtype:
        y.baddbmm_(torch.bmm(x, a.mT), b)
    else:
        y.add_(torch.bmm(torch.bmm(x.to(a.dtype), a.mT), b))


def low_rank_by_row(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute (x_i A_iᵀ) B_i without a gradient.

    Args:
        x: `[rows, tokens, in]`.
        a: A of each row `[rows, r, in]`, in `thin_dtype` or a wider one.
        b: B of each row, transposed and with its factor `[rows, r, out]`.

    Returns:
        `[rows, tokens, out]` in x's dtype.
    """
    dtype = thin_dtype(x, FEW_OF_A_ROW, len(x))
    return torch.bmm(torch.bmm(x.to(dtype), a.to(dtype).mT), b.to(dtype)).to(x.dtype)


def autocasts(x: Tensor) -> bool:
    """Say whether autocast would change dtypes inside a product of x; a node with its own backward must not be used."""
    return torch.is_autocast_enabled(x.device.type)


def unfolded(y: Tensor, x: Tensor) -> Tensor:
    """Give the rows of a product `[tokens, out]` the leading dimensions of its input `[..., in]`.

    To autograd the result is no view: one that comes out of a node may not be changed in place, as some models do.
    """
    shaped: Tensor = torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))
    return shaped


def _fake_mask(like: Tensor, width: int, p: float, seed: Tensor) -> Tensor:
    return like.new_empty(len(like), width)


@operator("dropout_mask(Tensor like, SymInt width, float p, Tensor seed) -> Tensor", _fake_mask)
def dropout_mask(like: Tensor, width: int, p: float, seed: Tensor) -> Tensor:
    """Draw ones, and zeros with probability p: `[len(like), width]` in the dtype of `like`."""
    words = _words((len(like) * width + 3) // 4, int(seed), like.device)
    drawn = words.view(torch.int16)[: len(like) * width].view(len(like), width)
    # Written in the dtype of `like` at once: to convert booleans costs more than to draw them.
    return torch.ge(drawn, round(p * _LEVELS) - _LEVELS // 2, out=like.new_empty(drawn.shape))


def _words(count: int, seed: int, device: torch.device) -> Tensor:
    """Draw `[count]` integers of 64 random bits."""
    if device.type == "cpu":  # torch's generator takes twice as long there
        return torch.from_numpy(np.random.SFC64(seed).random_raw(count).view(np.int64))
    draw = torch.Generator(device).manual_seed(seed)
    return torch.empty(count, dtype=torch.int64, device=device).random_(-(2**63), None, generator=draw)


def kept(p: float) -> float:
    """The share of elements that `dropout_mask` keeps."""
    return 1 - round(p * _LEVELS) / _LEVELS


def _fake_low_rank(x: Tensor, weight: Tensor, bias: Any, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(a))


@operator(
    "low_rank(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, float p, Tensor? seed)"
    " -> (Tensor, Tensor)",
    _fake_low_rank,
)
def low_rank(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute y and the thin product drop(x) Aᵀ, without its factor 1 / (1 − p), for x `[tokens, in]`."""
    h = (x if seed is None else x * dropout_mask(x, x.shape[1], p, seed)) @ a.to(x.dtype).T
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y.addmm_(h, b.to(x.dtype).T, alpha=scale / kept(p)), h


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        p: float,
        seed: Tensor | None,
        again: Callable[[], Tensor] | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, h = low_rank(flat, weight, bias, a, b, scale, p, seed)
        need_a, need_b = ctx.needs_input_grad[3:5]
        held = None if again else weight
        ctx.save_for_backward(flat if need_a else None, h if need_b else None, held, a, b, seed)
        ctx.scale, ctx.p, ctx.again = scale / kept(p), p, again
        ctx.bias_dtype = None if bias is None else bias.dtype
        return unfolded(y, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, h, weight, a, b, seed = ctx.saved_tensors
        need_x, _, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        g = grad.reshape(-1, grad.shape[-1])
        gx = ga = gb = gbias = None
        if need_x or need_a:
            gh = (g @ b.to(g.dtype)).mul_(ctx.scale)
            mask = None if seed is None else dropout_mask(g, a.shape[1], ctx.p, seed)
            if need_x:
                gx = thin_added(g @ (ctx.again() if ctx.again else weight), gh, a, mask)
                gx = gx.view(*grad.shape[:-1], a.shape[1])
            if need_a:
                ga = _of_a(gh, flat, mask).to(a.dtype)
        if need_b:
            gb = (g.T @ h).mul_(ctx.scale).to(b.dtype)
        if need_bias:
            gbias = g.sum(0).to(ctx.bias_dtype)
        return gx, None, gbias, ga, gb, None, None, None, None


def thin_added(wide: Tensor, h: Tensor, a: Tensor, mask: Tensor | None = None) -> Tensor:
    """Add h A to `wide` in place, where the mask has ones."""
    a = a.to(wide.dtype)
    return wide.addmm_(h, a) if mask is None else wide.addcmul_(h @ a, mask)


class Span(NamedTuple):
    """A low-rank update of some of the tokens of a batch.

    Attributes:
        start: first token.
        stop: behind the last one.
        a: A `[r, in]`.
        b: B `[out, r]`.
        scale: factor of the update.
        p: as for `low_rank_linear`.
        generator: of the CPU, for the seed of the dropout; None: the global one.
    """

    start: int
    stop: int
    a: Tensor
    b: Tensor
    scale: float
    p: float = 0.0
    generator: torch.Generator | None = None


def low_rank_spans(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spans: Sequence[Span],
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Compute `low_rank_linear` with other factors for other tokens, the product with W once for all.

    Args:
        x: `[..., in]`; tokens are counted over all leading dimensions.
        weight: `[out, in]`; gets no gradient.
        bias: `[out]` or None; gets none.
        spans: may overlap, and leave tokens out.
        again: as for `low_rank_linear`.

    Returns:
        `[..., out]` in x's dtype.
    """
    seeds = [_seed(span.generator) if span.p else None for span in spans]
    factors = [factor for span in spans for factor in (span.a, span.b)]
    bounds = [bound for span in spans for bound in (span.start, span.stop)]
    places = (bounds, [span.scale for span in spans], [span.p for span in spans])
    y: Tensor = _LowRankSpans.apply(x, weight, bias, again, places, seeds, *factors)
    return y


def _fake_spans(
    x: Tensor, weight: Tensor, bias: Any, a: Sequence[Tensor], b: Any, bounds: Sequence[int], *_: Any
) -> tuple[Tensor, Tensor]:
    thin = sum((stop - start) * len(one) for one, (start, stop) in zip(a, _pairs(bounds), strict=True))
    return x.new_empty(len(x), len(weight)), x.new_empty(thin)


@operator(
    "low_rank_spans(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, int[] bounds, float[] scales,"
    " float[] p, Tensor?[] seeds) -> (Tensor, Tensor)",
    _fake_spans,
)
def spans_of_low_rank(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    bounds: Sequence[int],
    scales: Sequence[float],
    p: Sequence[float],
    seeds: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Compute y and the thin products of `low_rank`, one behind the other, for x `[tokens, in]`."""
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    thin = x.new_empty(sum((stop - start) * len(one) for one, (start, stop) in zip(a, _pairs(bounds), strict=True)))
    for i, (h, (start, stop)) in enumerate(zip(_each_thin(thin, a, bounds), _pairs(bounds), strict=True)):
        part, seed = x[start:stop], seeds[i]
        part = part if seed is None else part * dropout_mask(part, part.shape[1], p[i], seed)
        torch.mm(part, a[i].to(x.dtype).T, out=h)
        y[start:stop].addmm_(h, b[i].to(x.dtype).T, alpha=scales[i] / kept(p[i]))
    return y, thin


def _pairs(bounds: Sequence[int]) -> Sequence[tuple[int, int]]:
    return list(zip(bounds[::2], bounds[1::2], strict=True))


def _each_thin(thin: Tensor, a: Sequence[Tensor], bounds: Sequence[int]) -> Sequence[Tensor]:
    """The thin product of each span `[tokens, r]`."""
    shapes = [(stop - start, len(one)) for one, (start, stop) in zip(a, _pairs(bounds), strict=True)]
    parts = thin.split([tokens * rank for tokens, rank in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _LowRankSpans(torch.autograd.Function):
    """As `_LowRankLinear`: it keeps x once, and of each span the thin product; masks are drawn again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, again: Any, places: Any, seeds: Any, *factors: Tensor
    ) -> Tensor:
        flat, (bounds, scales, p) = x.reshape(-1, x.shape[-1]), places
        a, b = factors[::2], factors[1::2]
        y, thin = spans_of_low_rank(flat, weight, bias, a, b, bounds, scales, p, seeds)
        need = ctx.needs_input_grad[6:]
        x_kept, thin_kept = flat if any(need[::2]) else None, thin if any(need[1::2]) else None
        ctx.save_for_backward(x_kept, thin_kept, None if again else weight, *seeds, *factors)
        ctx.again, ctx.places = again, places
        return unfolded(y, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, thin, weight, *rest = ctx.saved_tensors
        (bounds, scales, p), need = ctx.places, ctx.needs_input_grad
        seeds, factors = rest[: len(scales)], rest[len(scales) :]
        hs = [None] * len(scales) if thin is None else _each_thin(thin, factors[::2], bounds)
        g = grad.reshape(-1, grad.shape[-1])
        gx = g @ (ctx.again() if ctx.again else weight) if need[0] else None
        found: list[Tensor | None] = []
        for i, (start, stop) in enumerate(_pairs(bounds)):
            a, b, h, part = factors[2 * i], factors[2 * i + 1], hs[i], g[start:stop]
            scale, (need_a, need_b) = scales[i] / kept(p[i]), need[6 + 2 * i : 8 + 2 * i]
            ga = None
            if need_a or gx is not None:
                gh = (part @ b.to(g.dtype)).mul_(scale)
                mask = None if seeds[i] is None else dropout_mask(part, a.shape[1], p[i], seeds[i])
                if gx is not None:
                    thin_added(gx[start:stop], gh, a, mask)
                ga = _of_a(gh, flat[start:stop], mask).to(a.dtype) if need_a else None
            found += [ga, (part.T @ h).mul_(scale).to(b.dtype) if need_b and h is not None else None]
        shaped = None if gx is None else gx.view(*grad.shape[:-1], gx.shape[1])
        return shaped, None, None, None, None, None, *found


def _of_a(gh: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient of A `[r, in]`."""
    return gh.T @ (x if mask is None else x * mask)
