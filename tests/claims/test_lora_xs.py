"""LoRA-XS: r² numbers reach any change between the leading singular vectors, whatever the width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adapterlab as al
from adapterlab.errors import AttachError
from adapterlab.methods.low_rank.lora_xs import LoRAXS


def measure(width: int = 32, r: int = 4, steps: int = 300) -> tuple[float, int]:
    """The final loss as a share of the first on a target U_r M V_rᵀ, and the number of parameters."""
    torch.manual_seed(0)
    layer = nn.Linear(width, width, bias=False)
    with torch.no_grad():
        layer.weight.mul_(5)
    u, _, vh = torch.linalg.svd(layer.weight.detach())
    model = nn.Sequential(layer)
    x = torch.randn(128, width)
    target = x @ (layer.weight.detach() + u[:, :r] @ torch.randn(r, r) @ vh[:r]).T
    host = al.attach(model, al.LoRAXS(r=r, alpha=r, targets=["0"]))
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.02)
    losses = []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[-1] / losses[0], host.summary().trainable


@pytest.mark.parametrize("width", [16, 48])
def test_a_change_between_singular_vectors_is_reached(width: int) -> None:
    share, count = measure(width)
    assert share < 1e-3
    assert count == 16


def test_the_claim_fails_with_factors_that_are_not_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRAXS.Layer, "decompose", lambda self, *_: nn.init.orthogonal_(self.B))
    assert not measure()[0] < 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_factors_are_the_truncated_decomposition(family: str, tiny: Any) -> None:
    host = al.attach(tiny(family), al.LoRAXS(r=4))
    for layer in host.adapters("default").values():
        weight: Any = layer.site.weight().double()
        s = torch.linalg.svdvals(weight)
        left = (weight - layer.B.double() @ layer.A.double()).norm()
        assert left < 1.0001 * s[4:].norm()  # no rank-4 matrix is closer
        assert (layer.B.T @ layer.B - torch.eye(4)).abs().max() < 1e-5
        assert layer.M.std() < 1e-4


def test_ranks_above_the_width_are_refused(tiny: Any) -> None:
    with pytest.raises(AttachError, match=r"r=40.*up to 32"):
        al.attach(tiny("llama"), al.LoRAXS(r=40, targets=["q"]))
