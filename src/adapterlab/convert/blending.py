"""Ways to make one tensor of several: the weighted sum, TIES, DARE, and pruning by magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

How = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
HOWS: tuple[str, ...] = get_args(How)
SUMS = ("linear", "cat", "svd")  # these are the weighted sum itself, and differ in the factors made of it


def blend(
    tensors: Sequence[Tensor], weights: Sequence[float], how: str, density: float, generator: torch.Generator
) -> Tensor:
    """Combine changes of one parameter.

    Args:
        tensors: the changes, of one shape.
        weights: one for each.
        how: a name of `HOWS`.
        density: share of entries that pruning keeps, or probability that DARE keeps one.
        generator: of DARE's choices, on the CPU.
    """
    return joined([thinned(t, how, density, generator) for t in tensors], weights, how)


def thinned(tensor: Tensor, how: str, density: float, generator: torch.Generator) -> Tensor:
    """What remains of one change before it meets others."""
    if how.startswith("dare"):
        return drop(tensor, density, generator)
    return tensor if how in SUMS else prune(tensor, density)


def joined(tensors: Sequence[Tensor], weights: Sequence[float], how: str) -> Tensor:
    """Combine what remains of changes."""
    if how.endswith("ties"):
        return elect(tensors, weights)
    return torch.stack([w * t for w, t in zip(weights, tensors, strict=True)]).sum(0)


def prune(tensor: Tensor, density: float) -> Tensor:
    """Set all but the largest entries (by magnitude) to zero; at least one is kept."""
    flat = tensor.reshape(-1)
    kept = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    sparse = torch.zeros_like(flat)
    sparse[kept] = flat[kept]
    return sparse.view(tensor.shape)


def drop(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE: keep each entry with a probability, and divide by it, so that the expectation stays.

    arXiv 2311.03099, whose p is the probability to drop.
    """
    kept = torch.rand(tensor.shape, generator=generator) < density
    return tensor * kept.to(tensor.device) / density


def elect(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES, arXiv 2306.01708: each entry is the mean of the weighted values that have the sign of the entries' sum."""
    stacked = torch.stack(list(tensors))
    sign = torch.where(stacked.sum(0) >= 0, 1, -1)
    agrees = stacked.sign() == sign
    scale = torch.tensor(list(weights), dtype=stacked.dtype, device=stacked.device).view(-1, *[1] * tensors[0].ndim)
    return (stacked * scale * agrees).sum(0) / agrees.sum(0).clamp_min(1)
