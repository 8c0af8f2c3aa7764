"""The fast Walsh-Hadamard transform against scipy's matrix, and its gradient against the definition of an adjoint."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard

from adapterlab.ops.hadamard import walsh_hadamard


@pytest.mark.parametrize("size", [1, 2, 32, 64, 128, 4096])
def test_it_is_the_product_with_the_matrix(size: int) -> None:
    x = torch.randn(3, size, dtype=torch.float64)
    expected = x @ torch.tensor(hadamard(size), dtype=torch.float64)
    assert torch.allclose(walsh_hadamard(x), expected, atol=1e-10)


@pytest.mark.parametrize("size", [2, 64, 256])
def test_the_gradient_is_the_adjoint(size: int) -> None:
    """⟨H x, g⟩ = ⟨x, Hᵀ g⟩, with Hᵀ g from autograd; and finite differences, of second order too."""
    x = torch.randn(2, size, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, size, dtype=torch.float64)
    (pulled,) = torch.autograd.grad(walsh_hadamard(x), x, g)
    assert torch.allclose((walsh_hadamard(x) * g).sum(), (x * pulled).sum())
    small = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(walsh_hadamard, small)
    assert torch.autograd.gradgradcheck(walsh_hadamard, small)


def test_autocast_does_not_round_the_sums() -> None:
    x = torch.randn(1024)
    with torch.autocast("cpu", torch.bfloat16):
        found = walsh_hadamard(x)
    assert found.dtype == torch.float32
    assert torch.allclose(found, walsh_hadamard(x))


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="received 12: pad with zeros"):
        walsh_hadamard(torch.ones(12))
