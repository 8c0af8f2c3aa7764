"""MiLoRA's claim: training the weakest directions leaves the strongest of the weight as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterlab as al
from adapterlab.methods.low_rank import milora
from adapterlab.methods.low_rank._starts import balanced

WIDTH, TOP = 32, 6


def trained(method: Any) -> tuple[float, float]:
    """(the size of s · B0 A0 over the weight's, how far the strongest directions are still the same after training)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    weight = model[0].weight.detach().clone()
    host = al.attach(model, method)
    layer: Any = host.adapters("default")["0"]
    part = float(layer.delta().norm() / weight.norm())
    x, y = torch.randn(64, WIDTH), torch.randn(64, WIDTH)
    optimizer = torch.optim.Adam(host.parameters("default"), 2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    now = model[0].weight.detach() + layer.delta().detach()
    return part, float((top(weight).T @ top(now)).norm() ** 2 / TOP)


def top(weight: Tensor) -> Tensor:
    return torch.linalg.svd(weight).U[:, :TOP]


def measure() -> tuple[float, float, float, float]:
    part, kept = trained(al.MiLoRA(r=TOP, alpha=TOP, targets=["0"]))
    strong, lost = trained(al.PiSSA(r=TOP, alpha=TOP, targets=["0"]))
    return part, strong, kept, lost


def holds() -> bool:
    part, strong, kept, lost = measure()
    return part < 0.15 * strong and kept > lost + 0.1


def test_the_strongest_directions_are_kept() -> None:
    assert holds()


def test_the_claim_fails_on_the_strongest_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    def strongest(self: Any, weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(weight)
        return balanced(u[:, :r], s[:r], vh[:r], scale)

    monkeypatch.setattr(milora.MiLoRAStart, "factors", strongest)
    assert not holds()


def test_the_last_of_the_shorter_side_are_taken(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("gpt2")
    batch = batch_for(model)
    before = logits(model, batch)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    host = al.attach(model, al.MiLoRA(r=4, alpha=10))
    assert (logits(model, batch) - before).abs().max() < 1e-5
    for path, layer in host.adapters("default").items():
        s = torch.linalg.svdvals(weights[f"{path}.weight"])
        assert torch.allclose(torch.linalg.svdvals(layer.delta())[:4], s[-4:], atol=1e-5)
    assert host.summary().trainable == sum(4 * sum(a.site.shape) for a in host.adapters("default").values())
