"""A sparse update of a linear layer, alone or in one node with a frozen weight, in memory for its values."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterlab.ops.low_rank import unfolded
from adapterlab.ops.operator import operator


def sparse_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    out: int,
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Compute x (W + S)ᵀ + bias, S `[out, in]` zero but for some entries; without a weight x Sᵀ + bias.

    The node keeps x and the values. What is as large as the weight is made anew for the gradient. W + S is in the dtype
    of x, while the values may be wider, as the masters of a weight are.

    Args:
        x: `[..., in]`.
        weight: `[out, in]` or None; gets no gradient.
        bias: `[out]` or None; gets no gradient.
        values: of the entries `[k]`.
        indices: their rows and columns, integers `[2, k]`; what stands twice counts twice.
        out: number of rows of S.
        again: makes `weight` once more for the backward pass, so that a weight unpacked for this call is not kept.
    """
    y: Tensor = _SparseLinear.apply(x, weight, bias, values, indices, out, again)
    return y


def placed(values: Tensor, indices: Tensor, shape: tuple[int, int], onto: Tensor | None = None) -> Tensor:
    """Write the entries into zeros `[out, in]`, or add them to a copy of a matrix."""
    matrix = values.new_zeros(shape) if onto is None else onto.clone(memory_format=torch.contiguous_format)
    rows, columns = indices.long()
    matrix.view(-1).index_add_(0, rows * shape[1] + columns, values.to(matrix.dtype))
    return matrix


def _fake_entries(g: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return g.new_empty(indices.shape[1])


@operator("entries_of_product(Tensor g, Tensor x, Tensor indices) -> Tensor", _fake_entries)
def entries_of_product(g: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Compute single entries of gᵀ x, Σ_t g[t, row] x[t, column]: `[k]`, for g `[t, out]` and x `[t, in]`."""
    rows, columns = indices.long()
    if _samples(g) and bool((rows[1:] >= rows[:-1]).all()):
        starts = torch.cat([rows.new_zeros(1), torch.bincount(rows, minlength=g.shape[1]).cumsum(0)])
        _quietly()
        size, nothing = (g.shape[1], x.shape[1]), g.new_zeros(len(rows))
        wanted = torch.sparse_csr_tensor(starts, columns, nothing, size, check_invariants=False)
        return torch.sparse.sampled_addmm(wanted, g.T.contiguous(), x, beta=0.0).values()
    return (g.T @ x).view(-1)[rows * x.shape[1] + columns]


@functools.cache
def _quietly() -> None:
    """Let torch say here, once, and to nobody, that such tensors are in beta; what is used of them is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


def _samples(g: Tensor) -> bool:
    """Say whether torch computes single entries of a product for less than all of them."""
    return g.device.type == "cpu" and g.dtype in (torch.float32, torch.float64) and torch.backends.mkl.is_available()


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        values: Tensor,
        indices: Tensor,
        out: int,
        again: Callable[[], Tensor] | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat, None if again else weight, values, indices)
        ctx.shape, ctx.again = (out, flat.shape[1]), again
        matrix = placed(values if weight is not None else values.to(x.dtype), indices, ctx.shape, weight)
        return unfolded(F.linear(flat, matrix, None if bias is None else bias.to(x.dtype)), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, values, indices = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        gx = gv = None
        if ctx.needs_input_grad[0]:
            weight = ctx.again() if ctx.again else weight
            matrix = placed(values if weight is not None else values.to(g.dtype), indices, ctx.shape, weight)
            gx = (g @ matrix).view(*grad.shape[:-1], ctx.shape[1])
        if ctx.needs_input_grad[3]:
            gv = entries_of_product(g, flat, indices).to(values.dtype)
        return gx, None, None, gv, None, None, None
