"""The best product of two thin matrices for a given change of a weight, and how much of the change it keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterlab.errors import ConfigError

_LARGE = 512  # smaller side from which the randomised decomposition is tried
_SPARE = 8  # directions beyond those wanted that the randomised decomposition looks at
_TRUSTED = 1e-2  # largest residual of randomised triplets, relative to their values; the energy errs by its square


@dataclass(frozen=True)
class Factors:
    """A change of a weight as a product.

    Attributes:
        B: `[out, r]`.
        A: `[r, in]`.
    """

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        """Width r of the factors; the product's own rank may be smaller."""
        return self.A.shape[0]

    def dense(self) -> Tensor:
        """The change `[out, in]`."""
        return self.B @ self.A


@dataclass(frozen=True)
class Fit:
    """A truncated decomposition of a change.

    Attributes:
        factors: balanced: U √S and √S Vᵀ.
        norm: Frobenius norm of the change.
        lost: Frobenius norm of what the factors leave out.
    """

    factors: Factors
    norm: float
    lost: float

    @property
    def error(self) -> float:
        """Relative Frobenius error."""
        return self.lost / self.norm if self.norm else 0.0


def check_size(rank: int | None, energy: float | None) -> None:
    """Check that at most one of two ways to choose a rank is given, and that it is in range.

    Raises:
        ConfigError: it is not.
    """
    if rank is not None and energy is not None:
        raise ConfigError(f"rank={rank} and energy={energy} both choose the rank. Give one of them.")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank} is not valid: it must be 1 or more.")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy={energy} is not valid: it is the share of the squared norm to keep, such as 0.9.")


@torch.no_grad()
def fit(change: Tensor | Factors, rank: int | None = None, energy: float | None = None, floor: float = 0.0) -> Fit:
    """Approximate a change by a product of two thin matrices, as well as the rank allows.

    Args:
        change: `[out, in]`, or a product, of which no dense form is made.
        rank: largest rank; without it and `energy`, the rank of the change itself.
        energy: share of the squared Frobenius norm to keep; the smallest rank that does is taken.
        floor: singular values up to here are rounding. They count for nothing unless `rank` is given.
    """
    check_size(rank, energy)
    u, s, vh = svd(change, rank, energy)
    norm = _norm(change, s)
    kept = _rank(s, norm, rank, energy, floor)
    root = s[:kept].sqrt()
    factors = Factors(u[:, :kept] * root, root[:, None] * vh[:kept])
    if isinstance(change, Factors):
        lost = float(s[kept:].norm())
    else:
        lost = float(torch.linalg.norm(wide(change) - factors.dense()))
    return Fit(factors, norm, lost)


def svd(
    change: Tensor | Factors, rank: int | None = None, energy: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a change in float64: U `[out, k]`, singular values `[k]` in falling order, Vᵀ `[k, in]`.

    For a large matrix of which few directions are wanted, a randomised decomposition is tried first. Its triplets are
    checked, and the exact decomposition takes over where they have not converged or do not suffice.
    """
    if isinstance(change, Factors):
        left, middle_left = torch.linalg.qr(wide(change.B))
        right, middle_right = torch.linalg.qr(wide(change.A).T)
        u, s, vh = torch.linalg.svd(middle_left @ middle_right.T, full_matrices=False)
        return left @ u, s, vh @ right.T
    matrix = wide(change)
    small = min(matrix.shape)
    guess = (small // 16 if energy is not None else None) if rank is None else rank
    if small >= _LARGE and guess is not None and guess + _SPARE <= small // 4:
        found = _randomised(matrix, guess)
        enough = found is not None and (
            energy is None or float(found[1].square().sum()) >= energy * float(matrix.square().sum())
        )
        if found is not None and enough:
            return found
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its device has no such numbers."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _randomised(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The first singular triplets by random projection, or None when they have not converged."""
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=rank + _SPARE, niter=4)
    u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    if not bool(s.any()):
        return None
    both = torch.linalg.norm(matrix @ v - u * s) + torch.linalg.norm(u.T @ matrix - s[:, None] * v.T)
    return (u, s, v.T) if float(both) <= _TRUSTED * float(s.norm()) else None


def _norm(change: Tensor | Factors, s: Tensor) -> float:
    return float(s.norm()) if isinstance(change, Factors) else float(torch.linalg.norm(wide(change)))


def _rank(s: Tensor, norm: float, rank: int | None, energy: float | None, floor: float) -> int:
    """How many of the singular values to keep; at least one."""
    tiny = norm * torch.finfo(torch.float64).eps * math.sqrt(max(1, len(s)))
    real = int((s > (tiny if rank is not None else max(tiny, floor))).sum())
    if rank is not None:
        return max(1, min(rank, real))
    if energy is None:
        return max(1, real)
    sums = s.square().cumsum(0)
    short = int((sums < energy * norm**2 * (1 - 1e-12)).sum())  # of how many sums the energy is not reached
    return max(1, min(short + 1, real))
