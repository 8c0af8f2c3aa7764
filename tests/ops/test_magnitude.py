"""The product with separate row norms against the formula written out, and its gradients against differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapterlab.ops.magnitude import magnitude_linear, row_norms, row_squares


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_value_and_gradients(bias: bool, transposed: bool) -> None:
    weight = draw(5, 7, seed=0).T if transposed else draw(7, 5, seed=0)
    b0 = draw(7, seed=1) if bias else None
    a, b, gain = draw(2, 5, seed=2), draw(7, 2, seed=3), draw(7, seed=4)
    x = draw(2, 3, 5, seed=5)
    expected = (x @ (gain[:, None] * (weight + 1.5 * b @ a)).T) + (0 if b0 is None else b0)
    assert (magnitude_linear(x, weight, b0, a, b, 1.5, gain) - expected).abs().max() < 1e-12

    def through(x: Tensor, a: Tensor, b: Tensor, gain: Tensor, *shift: Tensor) -> Tensor:
        return magnitude_linear(x, weight, shift[0] if shift else None, a, b, 1.5, gain)

    gain[0] = 0  # a row that is switched off has a gradient all the same
    inputs = tuple(t.requires_grad_() for t in (x, a, b, gain, b0) if t is not None)
    assert torch.autograd.gradcheck(through, inputs)


def test_the_operator_says_what_it_returns() -> None:
    tensors = [draw(*shape, seed=i) for i, shape in enumerate(((3, 5), (7, 5), (7,), (2, 5), (7, 2)))]
    torch.library.opcheck(torch.ops.adapterlab.magnitude.default, (*tensors, 0.5, draw(7, seed=9)))


@pytest.mark.parametrize("missing", range(4))
def test_gradients_that_nobody_needs_are_left_out(missing: int) -> None:
    tensors = [draw(3, 5, seed=5), draw(2, 5, seed=2), draw(7, 2, seed=3), draw(7, seed=4)]
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i != missing)
    x, a, b, gain = tensors
    magnitude_linear(x, draw(7, 5, seed=0), None, a, b, 0.5, gain).sum().backward()
    assert [t.grad is None for t in tensors] == [i == missing for i in range(4)]


def test_a_gain_of_one_gives_the_base_to_the_bit_in_half_precision() -> None:
    x, weight, bias = (draw(*s, seed=i, dtype=torch.bfloat16) for i, s in enumerate(((4, 16), (8, 16), (8,))))
    a, b = draw(2, 16, seed=7, dtype=torch.float32), torch.zeros(8, 2)
    y = magnitude_linear(x, weight, bias, a, b, 2.0, torch.ones(8))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


def test_small_changes_of_the_gain_survive_in_half_precision() -> None:
    # 1.005 itself would round to 1.0078 in bfloat16; over many rows the mean of the outputs must follow it.
    x, weight = draw(4096, 16, seed=0, dtype=torch.bfloat16).abs(), draw(8, 16, seed=1, dtype=torch.bfloat16).abs()
    a, b = torch.zeros(1, 16), torch.zeros(8, 1)
    one, more = (magnitude_linear(x, weight, None, a, b, 1.0, torch.full((8,), g)).double() for g in (1.0, 1.005))
    assert ((more.sum(0) / one.sum(0) - 1.005).abs() < 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_equal_those_of_the_materialised_weight(dtype: torch.dtype) -> None:
    weight, a, b = draw(9, 13, seed=0, dtype=dtype), draw(3, 13, seed=1, dtype=dtype), draw(9, 3, seed=2, dtype=dtype)
    expected = (weight.double() + 0.7 * b.double() @ a.double()).norm(dim=1)
    norms = row_norms(weight, a, b, 0.7)
    assert torch.equal(norms, row_norms(weight, a, b, 0.7, row_squares(weight, norms.dtype)))
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert ((norms - expected) / expected).abs().max() < tolerance


def test_norms_carry_no_gradient_and_stay_positive() -> None:
    a, b = draw(2, 5, seed=1).requires_grad_(), torch.zeros(3, 2, dtype=torch.float64)
    norms = row_norms(torch.zeros(3, 5, dtype=torch.float64), a, b, 1.0)
    assert not norms.requires_grad
    assert (norms > 0).all()
