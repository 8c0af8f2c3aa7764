"""Rotations of features by blocks: I + D with D block-diagonal, made of skew-symmetric matrices Q.

Everything here is a difference from the identity, so that a small rotation survives in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.kept import Kept
from adapterlab.core.site import Site
from adapterlab.ops.rotation import gained, turned

# ---------------------------------------------------------------------- matrices


def skew(v: Tensor, b: int) -> Tensor:
    """Q = U − Uᵀ `[..., b, b]`, where v `[..., b (b − 1) / 2]` holds the part of U above the diagonal row by row.

    In float32 at least: inverses and powers lose the orthogonality in half precision.
    """
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    upper = v.new_zeros(*v.shape[:-1], b, b)
    rows, columns = torch.triu_indices(b, b, 1, device=v.device)
    upper[..., rows, columns] = v
    return upper - upper.mT


def above(q: Tensor) -> Tensor:
    """Undo `skew`: the part above the diagonal, row by row."""
    b = q.shape[-1]
    rows, columns = torch.triu_indices(b, b, 1, device=q.device)
    return q[..., rows, columns]


def cayley(q: Tensor) -> Tensor:
    """R − I for the rotation R = (I + Q)(I − Q)⁻¹: 2 Q (I − Q)⁻¹, which exists for every Q."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return 2 * q @ torch.linalg.inv_ex(eye - q).inverse


def series(q: Tensor, factors: Sequence[float]) -> Tensor:
    """The sum of `factors[i]` · Qⁱ⁺¹ by Horner's rule."""
    total = factors[-1] * q
    for factor in reversed(factors[:-1]):
        total = factor * q + q @ total
    return total


# ---------------------------------------------------------------------- sizes


def divisors(n: int) -> list[int]:
    """All divisors of n in order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n that is nearest to a number, the smaller of two; at most n."""
    return min(divisors(n), key=lambda d: (abs(d - wanted), d)) if wanted < n else n


def width(site: Site) -> int:
    """How many features are rotated: the inputs of a module, and of an embedding, whose inputs are tokens, its rows."""
    out, in_ = site.shape
    return out if site.kind == "embedding" else in_


# ---------------------------------------------------------------------- adapters


class Turn(NamedTuple):
    """One block-diagonal step of a rotation.

    Attributes:
        blocks: of D `[places, c, c]`, or one for all places `[1, c, c]`.
        stride: a block takes pieces of features that are this many pieces apart; 1 for c features in a row.
        piece: features in a piece.
    """

    blocks: Tensor
    stride: int = 1
    piece: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """X (I + D)."""
        if self.stride == 1:
            return turned(x, self.blocks)
        pieces = self.blocks.shape[-1] // self.piece
        gathered = x.unflatten(-1, (-1, pieces, self.stride, self.piece)).transpose(-3, -2)
        y = turned(gathered.reshape(x.shape), self.blocks)
        return y.unflatten(-1, (-1, self.stride, pieces, self.piece)).transpose(-3, -2).reshape(x.shape)

    def back(self, x: Tensor) -> Tensor:
        """X (I + D)ᵀ."""
        return self._replace(blocks=self.blocks.mT)(x)


class Rotation(Adapter):
    """Rotates the input of a linear layer, or the rows of an embedding, and may scale the outputs: W' = diag(s) W Rᵀ.

    x is rotated and not W: with t tokens that is t · in · b products and no gradient as large as the weight, and it
    leaves packed weights alone. Subclasses define `turns`.

    Attributes:
        s: factors of the outputs `[out]`, if those train.
    """

    s: nn.Parameter | None

    def __init__(self, site: Site, scales: bool):
        super().__init__(site)
        self.kept = Kept()
        self.s = site.parameter(site.shape[0]) if scales else None
        if self.s is not None:
            nn.init.ones_(self.s)

    def turns(self) -> list[Turn]:
        """The steps of the rotation; the first is applied first."""
        raise NotImplementedError

    def _turns(self) -> list[Turn]:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._precise()
        return self.kept.once("turns", self._precise, *self.parameters())

    def _precise(self) -> list[Turn]:
        with torch.autocast(self.site.device.type, enabled=False):
            return self.turns()

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; forget what was made of the tensors."""
        self.kept.clear()
        return super().train(mode)

    def rotated(self, x: Tensor) -> Tensor:
        """X R, in the dtype of x."""
        for turn in self._turns():
            x = turn(x)
        return x

    @torch.no_grad()
    def error(self) -> float:
        """How far the rotation is from one: the largest entry of |RᵀR − I| over its steps."""
        eyes = [torch.eye(turn.blocks.shape[-1], device=turn.blocks.device) for turn in self._turns()]
        whole = [turn.blocks + eye for turn, eye in zip(self._turns(), eyes, strict=True)]
        return max(float((r.mT @ r - eye).abs().max()) for r, eye in zip(whole, eyes, strict=True))

    def around(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Rotate what goes in, or an embedding's rows that come out, and scale what comes out."""
        if self.site.kind == "embedding":
            y = self.rotated(run(x, *args, **kwargs))
        else:
            y = run(self.rotated(x), *args, **kwargs)
        return y if self.s is None else gained(y, self.s - 1, self.site.unmerged.bias)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Diag(s) W Rᵀ (of an embedding: the table's rows times R); the base's own bias is not scaled."""
        if self.site.kind == "embedding":
            weight = self.rotated(weight.T).T
        else:
            for turn in reversed(self._turns()):
                weight = turn.back(weight)
        if self.s is None:
            return weight, bias
        gain = self.s.to(weight.dtype)
        own = self.site.unmerged.bias
        if bias is not None:
            fixed = bias.new_zeros(()) if own is None else own.to(bias.dtype)
            bias = fixed + gain * (bias - fixed)
        return gain[:, None] * weight, bias
