"""LoRA-XS: r² numbers reach any change between the leading singular vectors, whatever the width."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_factors_are_the_truncated_decomposition(family: str, tiny: Any) -> None:
    host = al.attach(tiny(family), al.LoRAXS(r=4))
    for layer in host.adapters("default").values():
        weight: Any = layer.site.weight().double()
        s = torch.linalg.svdvals(weight)
        left = (weight - layer.B.double() @ layer.A.double()).norm()
        assert left < 1.0001 * s[4:].norm()  # no rank-4 matrix is closer
        assert (layer.B.T @ layer.B - torch.eye(4)).abs().max() < 1e-5
        assert 0 < layer.M.abs().max() < 1e-4


def test_ranks_above_the_width_are_refused(tiny: Any) -> None:
    with pytest.raises(AttachError, match=r"r=40.*up to 32"):
        al.attach(tiny("llama"), al.LoRAXS(r=40, targets=["q"]))


def test_the_formula_in_float64(tiny: Any, randomise: Any) -> None:
    """W + s B M A with s = alpha / r."""
    host = al.attach(tiny("gpt2"), LoRAXS(r=4, alpha=6))
    randomise(host)
    for layer in host.adapters("default").values():
        site: Any = layer.site
        weight = site.weight().double() + 1.5 * layer.B.double() @ layer.M.double() @ layer.A.double()
        x = torch.randn(3, site.shape[1])
        assert (site.module(x) - x.double() @ weight.T - site.bias).abs().max() < 1e-3


LAYER = LoRAXS.Layer
DECOMPOSE = LAYER.decompose


def _then(change: Any) -> Mutation:
    def decompose(self: Any, *given: Any) -> None:
        DECOMPOSE(self, *given)
        with torch.no_grad():
            change(self)

    return (LAYER, "decompose", decompose)


BROKEN: dict[str, Mutation] = {
    "B of its own": (LAYER, "decompose", lambda self, *_: nn.init.orthogonal_(self.B)),
    "A random": _then(lambda layer: layer.A.normal_()),
    "A without singular values": _then(lambda layer: layer.A.div_(layer.A.norm(dim=1, keepdim=True))),
    "singular values in B": _then(lambda layer: (layer.B.mul_(n := layer.A.norm(dim=1)), layer.A.div_(n[:, None]))),
    "M starts at one": begun(LAYER, lambda layer, method: layer.M.fill_(1)),
    "M diagonal": (LAYER, "factors", lambda self: (self.A, self.B @ self.M.diag().diag())),
    "M transposed": (LAYER, "factors", lambda self: (self.A, self.B @ self.M.T)),
    "s left out": (LoRAXS, "scaling", lambda self, path: 1.0),
    "A and B train": begun(LAYER, lambda layer, method: setattr(layer, "extra", nn.Parameter(layer.A.clone()))),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_the_factors_are_the_truncated_decomposition, "llama"),
    test_the_formula_in_float64,
    functools.partial(test_a_change_between_singular_vectors_is_reached, 16),
    lines=BROKEN,
)
