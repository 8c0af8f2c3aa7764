"""The fast Walsh-Hadamard transform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BITS = 5  # the transform is a chain of products with Hadamard matrices of up to 2⁵ rows, faster than butterflies


def walsh_hadamard(x: Tensor) -> Tensor:
    """Compute H x along the last dimension, H `[n, n]` with entries ±1: H = H₂ ⊗ ⋯ ⊗ H₂, H₂ = [[1, 1], [1, −1]].

    H is symmetric and H H = n I. The gradient is H g; nothing is kept for it. Costs n log n.

    Args:
        x: `[..., n]`, n a power of two.

    Returns:
        `[..., n]` in the dtype of x.

    Raises:
        ValueError: n is no power of two.
    """
    n = x.shape[-1]
    if n & (n - 1) or not n:
        raise ValueError(f"The transform needs a power of two of elements, and received {n}: pad with zeros.")
    y: Tensor = _WalshHadamard.apply(x)
    return y


class _WalshHadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # Autocast would round the intermediate sums, which grow with n.
        with torch.autocast(x.device.type, enabled=False):
            return _transform(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y: Tensor = _WalshHadamard.apply(grad)  # H is its own adjoint
        return y


def _transform(x: Tensor) -> Tensor:
    for size in _sizes(x.shape[-1]):
        # x seen as [k₁, k₂, …]: transform the first axis and move it behind the others; after a round all are in place.
        x = (x.unflatten(-1, (size, -1)).transpose(-1, -2) @ _matrix(size, x)).flatten(-2)
    return x.clone() if x.shape[-1] == 1 else x


def _sizes(n: int) -> list[int]:
    """Split n into few factors of nearly one size: products with a very small matrix are as slow as with a larger."""
    bits = n.bit_length() - 1
    count = -(-bits // _BITS)
    return [1 << (bits + i) // count for i in range(count)]


def _matrix(size: int, like: Tensor) -> Tensor:
    h = like.new_ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h
