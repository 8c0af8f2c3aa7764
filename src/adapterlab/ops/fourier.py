"""Products with a matrix that few entries of its spectrum give, without the matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterlab.ops.low_rank import unfolded


class Entries(NamedTuple):
    """Entries of a real spectrum, by rows or by columns.

    Attributes:
        starts: of each row, where its first entry stands among all `[rows]`.
        places: the column of each entry `[k]`.
        source: which of the trained values it has `[k]`.
    """

    starts: Tensor
    places: Tensor
    source: Tensor


def symmetric_entries(flat: Tensor, out: int, in_: int) -> tuple[Entries, Entries]:
    """Return the entries of S, S(r, c) = ½ F(r, c) + ½ F(−r, −c): ifft2(S) is the real part of ifft2(F).

    Args:
        flat: row-major places of the values in F `[out, in]`.
        out: rows of F.
        in_: columns of F.

    Returns:
        The entries by rows and by columns; each has half of the value it comes from.
    """
    rows, columns, source = flat // in_, flat % in_, torch.arange(len(flat), device=flat.device)
    rows, columns, source = torch.cat([rows, -rows % out]), torch.cat([columns, -columns % in_]), source.repeat(2)
    return _ordered(rows, columns, source, out), _ordered(columns, rows, source, in_)


def _ordered(rows: Tensor, places: Tensor, source: Tensor, count: int) -> Entries:
    order = rows.argsort(stable=True)
    starts = torch.searchsorted(rows[order], torch.arange(count, device=rows.device))
    return Entries(starts.int(), places[order].int(), source[order].int())


def spectral_matrix(values: Tensor, entries: Entries, width: int) -> Tensor:
    """Compute Re(ifft2(F)) `[out, in]`.

    Args:
        values: those of F `[n]`.
        entries: of S, by rows.
        width: number of columns.
    """
    numbers = torch.arange(len(entries.places), device=values.device)
    rows = torch.searchsorted(entries.starts.long(), numbers, right=True) - 1
    halves = 0.5 * values.index_select(0, entries.source)
    spectrum = values.new_zeros(len(entries.starts) * width).index_add(0, rows * width + entries.places, halves)
    # The columns from the middle on are the first ones mirrored.
    half = spectrum.view(-1, width)[:, : width // 2 + 1]
    return torch.fft.irfft2(half, s=(len(entries.starts), width))


def spectral_product(x: Tensor, values: Tensor, by_row: Entries, by_column: Entries) -> Tensor:
    """Compute x ΔWᵀ, ΔW = Re(ifft2(F)) `[out, in]` for F zero but for n values.

    ΔW z = ifft(S ifft(z)) with the real S of `symmetric_entries`: one transform of each token on either side of a
    product with 2 n entries. ΔW is real, so two tokens are one complex vector. The transpose of ΔW is the like of Sᵀ.
    Costs about 5 t (out log out + in log in) + 4 n t operations for t tokens, where to make ΔW takes
    5 out in log(out in) and a product with it 2 t out in: see `few_tokens`.

    The node keeps x and the values, and transforms x again for the gradient of the values. It computes in their dtype.

    Args:
        x: `[..., in]`.
        values: those of F `[n]`, float32 or float64.
        by_row: the entries of S.
        by_column: the same by columns.

    Returns:
        `[..., out]` in x's dtype.
    """
    y: Tensor = _SpectralProduct.apply(x, values, by_row, by_column)
    return y


def few_tokens(tokens: int, out: int, in_: int) -> bool:
    """Say whether `spectral_product` is faster than to make ΔW and multiply with it, forwards and backwards.

    With bfloat16 tiles (Intel AMX) both took as long at 1.2 to 1.5 times the harmonic mean of out and in; larger layers
    and slower products favour the transforms.
    """
    return 0 < tokens * (out + in_) <= 2 * out * in_


class _SpectralProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, by_row: Entries, by_column: Entries) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat, values)
        ctx.entries = by_row, by_column
        return unfolded(_tokens(_times(by_row, values, _spectra(flat, values)), flat), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, values = ctx.saved_tensors
        by_row, by_column = ctx.entries
        g = grad.reshape(-1, grad.shape[-1])
        # In the other direction, whose spectra are mirrored: then the gradient of an entry is a product at its place.
        upper = _spectra(g, values, mirrored=True)
        gx = gv = None
        if ctx.needs_input_grad[0]:
            gx = _tokens(_times(by_column, values, upper), g, mirrored=True).view(*grad.shape[:-1], flat.shape[1])
        if ctx.needs_input_grad[1]:
            halves = 0.5 * _at_entries(by_row, upper, _spectra(flat, values))
            gv = torch.zeros_like(values).index_add_(0, by_row.source, halves)
        return gx, gv, None, None


def _spectra(x: Tensor, like: Tensor, mirrored: bool = False) -> Tensor:
    """The transforms of tokens `[t, width]`, two as one complex vector, as real columns `[width, 2 ⌈t / 2⌉]`."""
    half = -(-len(x) // 2)
    second = F.pad(x[half:], (0, 0, 0, 2 * half - len(x)))
    z = _transform(torch.complex(x[:half].to(like.dtype), second.to(like.dtype)), mirrored)
    return torch.view_as_real(z.T.contiguous()).flatten(1)


def _tokens(columns: Tensor, like: Tensor, mirrored: bool = False) -> Tensor:
    """The tokens `[t, width]` of which these columns are the spectra."""
    z = _transform(torch.view_as_complex(columns.unflatten(1, (-1, 2))).T.contiguous(), mirrored)
    return torch.cat([z.real, z.imag])[: len(like)].to(like.dtype)


def _transform(z: Tensor, mirrored: bool) -> Tensor:
    return torch.fft.fft(z, norm="forward") if mirrored else torch.fft.ifft(z)


def _times(entries: Entries, values: Tensor, columns: Tensor) -> Tensor:
    """S `[rows, width]` times columns `[width, t]`."""
    return _bags(entries, columns, 0.5 * values.index_select(0, entries.source))


def _bags(entries: Entries, columns: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(entries.places, columns, entries.starts, mode="sum", per_sample_weights=weights)


def _at_entries(entries: Entries, upper: Tensor, columns: Tensor) -> Tensor:
    """The product of two sets of columns `[rows, t]` and `[width, t]` at the places of the entries alone `[k]`."""
    with torch.enable_grad():
        weights = columns.new_ones(len(entries.places)).requires_grad_()
        (found,) = torch.autograd.grad(_bags(entries, columns, weights), weights, upper)
    return found
