"""Copies of weights in the order that the processor reads change how products are computed, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapterlab.engine import reordered_weights
from adapterlab.engine.reordered_weights import Reordered, ReorderedWeights, candidates, most_bytes
from adapterlab.foreign.private_torch import reordered

DTYPES = [torch.float32, torch.bfloat16]


class Net(nn.Module):
    """Two layers and a head that shares its weight with the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(24, 16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16, bias=False)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Any) -> Any:
        return self.head(self.down(torch.tanh(self.up(self.table(ids)))))


@pytest.fixture(autouse=True)
def _all_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reordered_weights, "_gain", lambda weights: 1.0)


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    if dtype not in DTYPES or not _works(dtype):
        pytest.skip(f"this processor has no such products in {dtype}")
    return Net().to(dtype)


def _works(dtype: torch.dtype) -> bool:
    try:
        reordered(torch.ones(8, 8, dtype=dtype), 1)
    except (AttributeError, RuntimeError):
        return False
    return True


def close(found: Any, wanted: Any) -> None:
    tolerance = 1e-5 if found.dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 7), (5,), (0,)])
@torch.no_grad()
def test_all_products_are_the_same(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model = net(dtype)
    ids, weights = torch.arange(24)[: max(shape, default=0)].expand(shape), list(model.parameters())
    wanted = model(ids)
    copies = ReorderedWeights(model, 10**6)
    assert type(model.up.weight) is type(model.head.weight) is Reordered
    assert copies.bytes == (2 * 16 * 40 + 16 * 24) * dtype.itemsize
    found = model(ids)
    assert type(found) is torch.Tensor
    assert found.shape == wanted.shape
    close(found, wanted)
    copies.close()
    assert [type(weight) for weight in model.parameters()] == [nn.Parameter] * len(weights)
    assert all(one is other for one, other in zip(model.parameters(), weights, strict=True))
    assert not copies.bytes
    assert not any(vars(weight) for weight in weights)


@torch.no_grad()
def test_the_copy_is_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), torch.randn(3, 16)
    wanted, copies = model.up(x), ReorderedWeights(model, 10**6)
    model.up.weight.copied = reordered(2 * model.up.weight, 1)
    close(model.up(x), 2 * (wanted - model.up.bias) + model.up.bias)
    copies.close()


@pytest.mark.parametrize("write", ["in place", "data"])
@torch.no_grad()
def test_a_weight_that_was_written_to_is_read_itself(write: str) -> None:
    model, x = net(), torch.randn(3, 16)
    copies = ReorderedWeights(model, 10**6)
    if write == "data":
        model.up.weight.data = model.up.weight.data + 1
    else:
        model.up.weight.add_(1)
    close(model.up(x), x @ (model.up.weight + 0).T + model.up.bias)
    copies.close()


def test_gradients_and_half_precision_go_the_usual_way() -> None:
    model, ids = net(), torch.arange(6)
    model(ids).square().mean().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    copies = ReorderedWeights(model, 10**6)
    model(ids).square().mean().backward()
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(parameter.grad, grad)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(ids).dtype == torch.bfloat16
    copies.close()


@torch.no_grad()
def test_all_else_sees_the_plain_weight() -> None:
    model, plain = net(), net()
    copies = ReorderedWeights(model, 10**6)
    for name, tensor in model.state_dict().items():
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, plain.state_dict()[name])
    weight = model.down.weight
    assert type(weight.T) is type(weight * 2) is type(weight.detach()) is torch.Tensor
    assert torch.equal(F.linear(weight.detach(), weight), weight.detach() @ weight.detach().T)
    twin = copy.deepcopy(model)
    close(twin(torch.arange(5)), plain(torch.arange(5)))
    copies.close()


def test_what_gains_most_comes_first_and_no_more_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    gains = {(40, 16): 3.0, (16, 40): 0.0, (24, 16): 1.0}
    monkeypatch.setattr(reordered_weights, "_gain", lambda weights: gains[tuple(weights[0].shape)])
    for budget, wanted in ((0, []), (4 * 640, [model.up]), (4 * 700, [model.up]), (10**6, [model.up, model.head])):
        copies = ReorderedWeights(model, budget)
        assert [m for m in (model.up, model.down, model.head) if type(m.weight) is Reordered] == wanted
        assert copies.bytes <= budget
        copies.close()
    assert len(candidates(model)) == 3
    assert (most_bytes(model, 100), most_bytes(model, 10**6)) == (100, 4 * (2 * 640 + 384))


def test_a_trial_refuses_what_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model, ticks = net(), iter(range(10**6))
    monkeypatch.setattr(reordered_weights, "_seconds", lambda product, weights: 10.0 - next(ticks))
    assert reordered_weights._gain([model.up.weight]) == 1.0
    monkeypatch.setattr(reordered_weights, "reordered_linear", lambda x, copied, bias: F.linear(x, x.new_ones(40, 16)))
    assert reordered_weights._gain([model.up.weight]) == 0.0
    monkeypatch.setattr(reordered_weights, "reordered", lambda weight, rows: (_ for _ in ()).throw(RuntimeError()))
    assert reordered_weights._gain([model.up.weight]) == 0.0
