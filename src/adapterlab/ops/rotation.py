"""Turning features block by block, and scaling outputs: changes near the identity, applied as differences from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapterlab.ops.low_rank import autocasts


def turned(x: Tensor, blocks: Tensor) -> Tensor:
    """Compute x (I + D) for a block-diagonal D, in the dtype of x; the node keeps x and the blocks alone.

    Costs b multiplications a feature, in one batched product that reads x where it lies.

    Args:
        x: `[..., n b]`.
        blocks: the blocks of D `[n, b, b]`, or `[1, b, b]` for one that stands at every place.
    """
    if autocasts(x):  # a node with its own backward must not see dtypes change
        return x + torch.einsum("...ni,nij->...nj", *_split(x, blocks)).reshape(x.shape).to(x.dtype)
    y: Tensor = _Turned.apply(x, blocks)
    return y


def gained(y: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
    """Compute y + d ⊙ (y − bias) in the dtype of y: the outputs of a layer times 1 + d, without its bias."""
    scaled: Tensor = _Gained.apply(y, d, bias)
    return scaled


def _split(x: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    places = x.shape[-1] // blocks.shape[-1]
    return x.unflatten(-1, (places, -1)), blocks.expand(places, -1, -1)


def _columns(x: Tensor, blocks: Tensor) -> Tensor:
    """The features of each block `[n, rows, b]`; a shared one sees those of all places below each other."""
    return x.reshape(-1, *blocks.shape[:2]).transpose(0, 1)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor) -> Tensor:
        ctx.save_for_backward(x, blocks)
        return _added(x, blocks.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, blocks = ctx.saved_tensors
        gx = gd = None
        if ctx.needs_input_grad[0]:
            gx = _added(grad, blocks.to(grad.dtype).mT)
        if ctx.needs_input_grad[1]:
            gd = (_columns(x, blocks).mT @ _columns(grad, blocks)).to(blocks.dtype)
        return gx, gd


def _added(x: Tensor, blocks: Tensor) -> Tensor:
    """Compute x + x D."""
    y = x.clone(memory_format=torch.contiguous_format)
    _columns(y, blocks).baddbmm_(_columns(x, blocks), blocks)
    return y


class _Gained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, d, bias)
        change = d.to(y.dtype)
        scaled = torch.addcmul(y, y, change)
        return scaled if bias is None else scaled.sub_(change * bias.to(y.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, d, bias = ctx.saved_tensors
        gy = gd = gbias = None
        if ctx.needs_input_grad[0]:
            gy = torch.addcmul(grad, grad, d.to(grad.dtype))
        total = grad.flatten(0, -2).sum(0, dtype=d.dtype)
        if ctx.needs_input_grad[1]:
            gd = (grad * y).flatten(0, -2).sum(0, dtype=d.dtype)
            gd = gd if bias is None else gd - bias.to(d.dtype) * total
        if bias is not None and ctx.needs_input_grad[2]:
            gbias = (-d * total).to(bias.dtype)
        return gy, gd, gbias
