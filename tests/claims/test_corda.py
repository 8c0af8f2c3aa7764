"""CorDA's claim: in a basis that knows the inputs, the weakest components matter less to what the module answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterlab as al
from adapterlab.methods.low_rank import corda
from adapterlab.methods.low_rank._starts import Place, Start

IN, OUT, DROPPED = 40, 32, 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def inputs() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(IN, IN, generator=draw)).Q
    return torch.randn(256, IN, generator=draw) * torch.linspace(3, 0.05, IN) @ turn.T


def adapted(mode: str) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    model = Net()
    weight = model.layer.weight.detach().clone()
    method = al.CorDA(r=DROPPED, alpha=3, targets=["layer"], init={"name": "corda", "mode": mode})
    host = al.attach(model, method)
    method.prepare(host, "default", [{"x": inputs()}])
    return model, host.adapters("default")["layer"], weight


def measure() -> tuple[float, float]:
    """The change of the outputs when the weakest components are dropped: in CorDA's basis and in the plain one."""
    _, layer, weight = adapted("kpm")
    x = inputs()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    tail = u[:, -DROPPED:] * s[-DROPPED:] @ vh[-DROPPED:]
    return tuple(float((x @ part.T).norm() / (x @ weight.T).norm()) for part in (layer.delta().detach(), tail))


def holds() -> bool:
    ours, plain = measure()
    return ours < 0.6 * plain


def test_dropping_the_weakest_costs_less() -> None:
    assert holds()


def test_the_claim_fails_without_the_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = corda.CorDAStart.oriented

    def blind(self: Any, place: Place, covariance: Tensor) -> Start:
        return whole(self, place, torch.eye(IN))

    monkeypatch.setattr(corda.CorDAStart, "oriented", blind)
    assert not holds()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_start_is_the_base(mode: str) -> None:
    model, layer, weight = adapted(mode)
    assert torch.allclose(model.layer.weight + layer.delta(), weight, atol=1e-5)
    assert (model(inputs()) - inputs() @ weight.T).abs().max() < 1e-4
    assert not torch.allclose(model.layer.weight, weight, atol=1e-3)
    assert sum(p.numel() for p in (layer.A, layer.B)) == DROPPED * (IN + OUT)


def test_the_strongest_hold_most_of_the_output() -> None:
    shares = []
    for mode in ("ipm", "kpm"):
        _, layer, weight = adapted(mode)
        shares.append(float((inputs() @ layer.delta().T).norm() / (inputs() @ weight.T).norm()))
    assert shares[0] > 0.8
    assert shares[1] < 0.1


def test_before_data_it_is_plain_lora(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("gpt2")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.CorDA(r=4))
    assert torch.equal(logits(model, batch), base)
    assert al.CorDA.capabilities()["needs_data"]
    assert not al.PiSSA.capabilities()["needs_data"]
    modes = {m: m.training for m in model.modules()}
    host.methods["default"].prepare(host, "default", [batch])
    assert (logits(model, batch) - base).abs().max() < 1e-5
    assert modes == {m: m.training for m in model.modules()}
    assert not any(m._forward_pre_hooks for m in model.modules())
