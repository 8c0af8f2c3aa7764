"""The product with a matrix of few Fourier coefficients against torch's two-dimensional transform of all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapterlab.ops.fourier import spectral_matrix, spectral_product, symmetric_entries

SHAPES = [(6, 8), (5, 7), (8, 5), (1, 4), (9, 1), (1, 1)]


def case(out: int, in_: int, share: float) -> tuple[Tensor, Tensor]:
    """Places, those that are their own mirror image among them, and values."""
    draw = torch.Generator().manual_seed(0)
    n = max(1, int(share * out * in_))
    return torch.randperm(out * in_, generator=draw)[:n], torch.randn(n, generator=draw, dtype=torch.float64)


def dense(flat: Tensor, values: Tensor, out: int, in_: int) -> Tensor:
    full = torch.zeros(out * in_, dtype=values.dtype).index_put((flat,), values)
    return torch.fft.ifft2(full.view(out, in_)).real


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_matrix_is_the_real_part_of_the_transform(shape: tuple[int, int], share: float) -> None:
    flat, values = case(*shape, share)
    found = spectral_matrix(values, symmetric_entries(flat, *shape)[0], shape[1])
    assert torch.allclose(found, dense(flat, values, *shape), atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("tokens", [(1,), (4,), (3, 5), ()])
def test_product_and_gradients(shape: tuple[int, int], share: float, tokens: tuple[int, ...]) -> None:
    """Of even and odd numbers of tokens, for two of them are one complex vector."""
    flat, values = case(*shape, share)
    x = torch.randn(*tokens, shape[1], dtype=torch.float64).requires_grad_()
    values.requires_grad_()
    wanted = x @ dense(flat, values, *shape).T
    found = spectral_product(x, values, *symmetric_entries(flat, *shape))
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-13)
    upper = torch.randn_like(wanted)
    pairs = [torch.autograd.grad((y * upper).sum(), (x, values)) for y in (found, wanted)]
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(*pairs, strict=True))


def test_half_precision_is_computed_in_float32() -> None:
    flat, values = case(48, 32, 0.2)
    x, values = torch.randn(9, 32).bfloat16(), values.float()
    found = spectral_product(x, values, *symmetric_entries(flat, 48, 32))
    wanted = x.double() @ dense(flat, values.double(), 48, 32).T
    assert found.dtype == torch.bfloat16
    assert (found.double() - wanted).norm() < 3e-3 * wanted.norm()  # one rounding of the result
