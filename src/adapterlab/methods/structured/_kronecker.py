"""Updates that are Kronecker products, in one form: ΔW = s · L ⊗ R; a method chooses sizes, s, start and factors.

L `[a1, a2]` and R `[b1, b2]` with a1 b1 = out and a2 b2 = in; each is a matrix or a chain of thin ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterlab.core.adapter import Delta

Factor = Sequence[Tensor]


def split(size: int, factor: int = -1) -> tuple[int, int]:
    """Write a size as a product of two.

    Args:
        size: to split.
        factor: the first part, where it divides the size; else the largest the first part may be; -1: no limit.

    Returns:
        (m, n) with m n = size. Unless `factor` divides, m is the largest divisor that is at most √size.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    m = max((d for d in range(1, limit + 1) if size % d == 0), default=1)
    return m, size // m


def kronecker_linear(x: Tensor, left: Factor, right: Factor) -> Tensor:
    """Compute x (L ⊗ R)ᵀ without the product: with x as rows X `[a2, b2]`, each becomes L X Rᵀ.

    Args:
        x: `[..., a2 b2]`.
        left: matrices whose product is L `[a1, a2]`.
        right: matrices whose product is R `[b1, b2]`.

    Returns:
        `[..., a1 b1]`.
    """
    rows = x.unflatten(-1, (left[-1].shape[1], right[-1].shape[1]))
    for matrix in reversed(right):
        rows = rows @ matrix.T
    for matrix in reversed(left):
        rows = matrix @ rows
    return rows.flatten(-2)


def kronecker_columns(ids: Tensor, left: Factor, right: Factor) -> Tensor:
    """Look up columns of L ⊗ R `[a1 b1, a2 b2]` without the product.

    Args:
        ids: `[...]`, numbers of columns.
        left: matrices whose product is L `[a1, a2]`.
        right: matrices whose product is R `[b1, b2]`.

    Returns:
        `[..., a1 b1]`.
    """
    count = right[-1].shape[1]
    first, second = _columns(ids // count, left), _columns(ids % count, right)
    return (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)


class KroneckerLayer(Delta):
    """The factors at one module.

    Attributes:
        scale: s.
    """

    casts: ClassVar[bool] = False

    def sides(self) -> tuple[Factor, Factor]:
        """The matrices whose products are L and R."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """ΔW = s · L ⊗ R `[out, in]`."""
        left, right = (functools.reduce(torch.matmul, factor) for factor in self.sides())
        return self.scale * torch.kron(left, right)

    def forward(self, x: Tensor) -> Tensor:
        """The update's share of the output, in the dtype of x (of the factors for token ids)."""
        if not x.is_floating_point():
            return self.scale * kronecker_columns(x, *self.sides()) * self.site.gain
        left, right = ([matrix.to(x.dtype) for matrix in factor] for factor in self.sides())
        return self.scale * kronecker_linear(x, left, right)


def _columns(ids: Tensor, factor: Factor) -> Tensor:
    found = F.embedding(ids, factor[-1].T)
    for matrix in reversed(factor[:-1]):
        found = F.linear(found, matrix)
    return found
