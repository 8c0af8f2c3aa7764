"""Updates of runs of tokens on a GPU: two kernels in Triton, f(x Aᵀ + d) and what is added to y, that get addresses.

As Punica's SGMV (arXiv 2310.18547): tokens in pieces of up to 16, of which each has one update; ranks in blocks of 16,
of which an update has as many as it needs. A piece of one token, as in decoding, fills a tile with itself alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from adapterlab.errors import BuildError
from adapterlab.ops.segmented import TYPES, Entries, Runs, cut, off

_AT_ONCE = 16  # tokens of a piece, and numbers of a block of ranks: what a product of tiles takes at least
_BLOCK = 64  # columns of x, and of y, that are read at a time


@triton.jit  # type: ignore[untyped-decorator]
def _numbers(address: Any, places: Any, mask: Any, kind: Any, dtype: tl.constexpr) -> Any:
    """Numbers of a type that is known when the kernel runs."""
    if kind == 0:
        found = tl.load(address.to(tl.pointer_type(tl.float32)) + places, mask=mask, other=0.0).to(dtype)
    elif kind == 1:
        found = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + places, mask=mask, other=0.0).to(dtype)
    else:
        found = tl.load(address.to(tl.pointer_type(tl.float16)) + places, mask=mask, other=0.0).to(dtype)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _tanh(z: Any) -> Any:
    return 1 - 2 / (tl.exp(2 * z) + 1)


@triton.jit  # type: ignore[untyped-decorator]
def _activated(z: Any, f: Any) -> Any:
    """One of `FUNCTIONS`, by its place."""
    if f == 1:
        z = tl.where(z < 0, 0.0, z)
    if f == 2:
        z = 0.5 * z * (1 + tl.erf(z * 0.70710678))
    if f == 3:
        z = 0.5 * z * (1 + _tanh(0.79788456 * (z + 0.044715 * z * z * z)))
    if f == 4:
        z = z / (1 + tl.exp(-z))
    if f == 5:
        z = _tanh(z)
    return z


@triton.jit  # type: ignore[untyped-decorator]
def _shrink(
    words: Any, scales: Any, pieces: Any, x: Any, h: Any, n_in: Any, width: Any,
    AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
) -> None:  # fmt: skip
    """Compute h = s · f(x Aᵀ + d) `[tokens, width]` for a piece and a block of ranks."""
    piece, block = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(pieces + 3 * piece), tl.load(pieces + 3 * piece + 1)
    update = tl.load(pieces + 3 * piece + 2)
    a, d, f = tl.load(words + 6 * update), tl.load(words + 6 * update + 2), tl.load(words + 6 * update + 5)
    rank, kind = tl.load(words + 6 * update + 3), tl.load(words + 6 * update + 4)
    if block * AT_ONCE < rank:
        tokens = start + tl.arange(0, AT_ONCE)
        ranks = block * AT_ONCE + tl.arange(0, AT_ONCE)
        found = tl.zeros((AT_ONCE, AT_ONCE), tl.float32)
        for k in range(0, n_in, BLOCK):
            columns = k + tl.arange(0, BLOCK)
            inside = (tokens[:, None] < stop) & (columns[None, :] < n_in)
            left = tl.load(x + tokens[:, None].to(tl.int64) * n_in + columns[None, :], mask=inside, other=0.0)
            there = (ranks[None, :] < rank) & (columns[:, None] < n_in)
            right = _numbers(a, ranks[None, :].to(tl.int64) * n_in + columns[:, None], there, kind, dtype)
            found = tl.dot(left.to(dtype), right, found, input_precision="ieee")
        if d != 0:
            found += _numbers(d, ranks, ranks < rank, kind, tl.float32)[None, :]
        found = _activated(found, f)
        held = h + tokens[:, None].to(tl.int64) * width + ranks[None, :]
        tl.store(held, tl.load(scales + update) * found, mask=(tokens[:, None] < stop) & (ranks[None, :] < width))


@triton.jit  # type: ignore[untyped-decorator]
def _expand(
    words: Any, pieces: Any, h: Any, y: Any, out: Any, width: Any,
    AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
) -> None:  # fmt: skip
    """Add h Bᵀ to y `[tokens, out]` for a piece and a block of columns."""
    piece, block = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(pieces + 3 * piece), tl.load(pieces + 3 * piece + 1)
    update = tl.load(pieces + 3 * piece + 2)
    b, rank, kind = tl.load(words + 6 * update + 1), tl.load(words + 6 * update + 3), tl.load(words + 6 * update + 4)
    tokens = start + tl.arange(0, AT_ONCE)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros((AT_ONCE, BLOCK), tl.float32)
    for r in range(0, rank, AT_ONCE):
        ranks = r + tl.arange(0, AT_ONCE)
        inside = (tokens[:, None] < stop) & (ranks[None, :] < rank)
        left = tl.load(h + tokens[:, None].to(tl.int64) * width + ranks[None, :], mask=inside, other=0.0)
        there = (ranks[:, None] < rank) & (columns[None, :] < out)
        right = _numbers(b, ranks[:, None].to(tl.int64) * out + columns[None, :], there, kind, dtype)
        found = tl.dot(left.to(dtype), right, found, input_precision="ieee")
    inside = (tokens[:, None] < stop) & (columns[None, :] < out)
    held = y + tokens[:, None].to(tl.int64) * out + columns[None, :]
    before = tl.load(held, mask=inside, other=0.0)
    tl.store(held, (before.to(tl.float32) + found).to(before.dtype), mask=inside)


class ByTriton:
    """The kernels; see `ops.segmented.Way`."""

    name = "Triton kernels"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    long: float = math.inf

    def __init__(self, device: str = "cuda"):
        """Try them.

        Raises:
            BuildError: they cannot be compiled here, or do not compute what they should.
        """
        try:
            why = off(self, device)
        except Exception as error:  # of a compiler
            raise BuildError(f"Triton fails: {type(error).__name__}: {str(error)[:300]}") from error
        if why:
            raise BuildError(f"Triton's kernels compute something else here: {why}")

    def step(self, table: Entries, widths: Sequence[tuple[int, int]], runs: Runs) -> _Step:
        return _Step(table, widths, runs)


class _Step:
    """The tables of a step, on the device of the first call."""

    def __init__(self, table: Entries, widths: Sequence[tuple[int, int]], runs: Runs):
        self.widths, self.total = widths, runs.total
        addresses = [table[name].view(np.int64) for name in ("a", "b", "d")]
        fields = [*addresses, *(table[name].astype(np.int64) for name in ("rank", "type", "f"))]
        kinds = set(table["type"][table["rank"] > 0].tolist())
        self.kind = kinds.pop() if len(kinds) == 1 else None
        self.width = -(-int(table["rank"].max(initial=0)) // _AT_ONCE) * _AT_ONCE
        self.tables = [torch.from_numpy(np.stack(fields, -1)), torch.from_numpy(table["scale"].copy())]
        self.pieces = [torch.tensor(cut(one, _AT_ONCE), dtype=torch.int32) for one in runs.rounds]

    def __call__(self, module: int, x: Tensor, y: Tensor) -> None:
        n_in, out = self.widths[module]
        fits = x.numel() == self.total * n_in and y.numel() == self.total * out and x.dtype is y.dtype
        if not (fits and x.device == y.device and y.is_contiguous() and x.dtype in TYPES):
            raise ValueError(
                f"{self.total} tokens of {n_in} numbers are multiplied here and added to as many of {out}, one behind "
                f"the other; received {list(x.shape)} {x.dtype} and {list(y.shape)} {y.dtype}."
            )
        if not self.width or not self.pieces:
            return
        if self.tables[0].device != x.device:
            self.tables = [t.to(x.device) for t in self.tables]
            self.pieces = [t.to(x.device) for t in self.pieces]
        words, scales = (t[module] for t in self.tables)
        # Tiles are multiplied in half precision only if that rounds no factor.
        dtype = _DTYPES[x.dtype] if TYPES[x.dtype] == self.kind else tl.float32
        if dtype == tl.bfloat16 and _INTERPRETED:
            dtype = tl.float32
        x = x.contiguous()
        h = torch.empty(self.total, self.width, dtype=torch.float32, device=x.device)
        for pieces in self.pieces:
            told = {"AT_ONCE": _AT_ONCE, "BLOCK": _BLOCK, "dtype": dtype}
            first = (len(pieces), self.width // _AT_ONCE)
            _shrink[first](words, scales, pieces, x, h, n_in, self.width, **told)
            _expand[len(pieces), triton.cdiv(out, _BLOCK)](words, pieces, h, y, out, self.width, **told)


_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # it multiplies bfloat16 as if it were whole numbers
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
