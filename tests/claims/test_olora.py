"""OLoRA's claim: orthonormal directions of the weight reach a loss in fewer steps than the usual start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterlab as al
from adapterlab.methods.low_rank import olora

WIDTH = 32


def steps(method: Any, limit: int = 300) -> int:
    """Steps until the loss against another weight is below three quarters of what it was."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(2)
    x = torch.randn(128, WIDTH)
    target = x @ (model[0].weight.detach() + 0.3 * torch.randn(WIDTH, 8) @ torch.randn(8, WIDTH) / 8).T
    host = al.attach(model, method)
    optimizer = torch.optim.SGD(host.parameters("default"), 1e-1)
    first = None
    for step in range(limit):
        loss = (model(x) - target).square().mean()
        first = first or loss.item()
        if loss.item() < 0.75 * first:
            return step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return limit


def measure() -> float:
    return steps(al.OLoRA(r=8, alpha=8, targets=["0"])) / steps(al.LoRA(r=8, alpha=8, targets=["0"]))


def holds() -> bool:
    return measure() < 0.7


def test_fewer_steps_are_needed() -> None:
    assert holds()


def test_the_claim_fails_with_tiny_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(self: Any, weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
        q, upper = torch.linalg.qr(weight)
        return 0.1 * upper[:r], 0.1 * q[:, :r]

    monkeypatch.setattr(olora.OLoRAStart, "factors", small)
    assert not holds()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_b_is_orthonormal_and_the_start_is_the_base(family: str, tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    before = logits(model, batch)
    host = al.attach(model, al.OLoRA(r=4, alpha=6))
    assert (logits(model, batch) - before).abs().max() < 1e-5
    layers = host.adapters("default").values()
    for layer in layers:
        assert torch.allclose(layer.B.T @ layer.B, torch.eye(4), atol=1e-5)
    assert host.summary().trainable == sum(4 * sum(layer.site.shape) for layer in layers)
