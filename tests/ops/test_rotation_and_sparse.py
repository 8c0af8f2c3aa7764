"""Nodes with a backward of their own: their gradients by differences, and what they do under autocast."""

from __future__ import annotations

import pytest
import torch

from adapterlab.ops.rotation import gained, turned
from adapterlab.ops.sparse_update import placed, sparse_linear


def doubles(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("blocks", [3, 1])
def test_gradients_of_a_rotation(blocks: int) -> None:
    x, d = doubles((2, 4, 12), (blocks, 4, 4))
    dense = torch.block_diag(*d.expand(3, 4, 4))
    assert torch.allclose(turned(x, d), x + x @ dense)
    assert torch.autograd.gradcheck(turned, (x, d))
    assert torch.autograd.gradcheck(lambda x: turned(x.transpose(0, 1), d), (x,))


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_factors_of_outputs(bias: bool) -> None:
    y, d, b = doubles((2, 3, 5), (5,), (5,))
    assert torch.autograd.gradcheck(gained, (y, d, b if bias else None))


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 2, 1]])
def test_gradients_of_single_entries(base: bool, order: list[int]) -> None:
    """Sorted or not, and with one that stands twice."""
    x, w, values = doubles((2, 3, 6), (5, 6), (4,))
    indices = torch.tensor([[0, 2, 2, 4], [5, 1, 1, 0]], dtype=torch.int32)[:, order]
    weight = w.detach() if base else None

    def run(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return sparse_linear(x, weight, None, values, indices, 5)

    dense = placed(values, indices, (5, 6), weight)
    assert torch.allclose(run(x, values), x @ dense.T)
    assert torch.autograd.gradcheck(run, (x, values))


def test_under_autocast_a_rotation_keeps_its_input_and_gives_gradients_in_its_own_dtype() -> None:
    x, d = torch.randn(5, 12, requires_grad=True), (torch.randn(3, 4, 4) * 1e-4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = turned(x, d)
    assert y.dtype == torch.float32
    assert (y - x - x @ torch.block_diag(*d)).abs().max() < 1e-5
    y.sum().backward()
    assert d.grad is not None
    assert d.grad.dtype == torch.float32
