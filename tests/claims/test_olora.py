"""OLoRA's claim: orthonormal directions of the weight reach a loss in fewer steps than the usual start."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.methods.low_rank._factors import Factors
from adapterlab.methods.low_rank.olora import OLoRAStart

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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factors_are_those_of_the_weight_and_the_start_is_the_base(
    family: str, tiny: Any, batch_for: Any, logits: Any
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    before = logits(model, batch)
    weights = [site.weight().clone() for site in al.attach(tiny(family), al.LoRA(r=1)).sites(al.OLoRA().targets)]
    host = al.attach(model, al.OLoRA(r=4, alpha=6))
    assert (logits(model, batch) - before).abs().max() < 1e-5
    layers = host.adapters("default").values()
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.allclose(layer.B.T @ layer.B, torch.eye(4), atol=1e-5)
        assert torch.allclose(layer.A, layer.B.T @ weight, atol=1e-5)
        assert torch.allclose((layer.B @ layer.A)[:, :4], weight[:, :4], atol=1e-5)  # the first columns, no others
    assert host.summary().trainable == sum(4 * sum(layer.site.shape) for layer in layers)


FACTORS = OLoRAStart.factors


def _made(change: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]) -> Mutation:
    """Another A and B made of the right ones and the scale."""
    return (OLoRAStart, "factors", lambda self, w, r, scale: change(*FACTORS(self, w, r, scale), scale))


def _orthonormal(like: Tensor) -> Tensor:
    return torch.linalg.qr(torch.randn_like(like))[0]


def _basis(of: Callable[[Tensor], Tensor]) -> Mutation:
    """The first r columns of another orthonormal basis, and what W is in it."""
    return (OLoRAStart, "factors", lambda self, w, r, s: ((b := of(w)[:, :r]).T @ w, b))


BROKEN: dict[str, Mutation] = {
    "factors too small": _made(lambda a, b, s: (0.1 * a, 0.1 * b)),
    "A random": _made(lambda a, b, s: (torch.randn_like(a) * a.std(), b)),
    "B random": _made(lambda a, b, s: (a, _orthonormal(b))),
    "another basis of the outputs": _basis(_orthonormal),
    "the last columns and rows": (
        OLoRAStart, "factors", lambda self, w, r, s: (torch.linalg.qr(w).R[-r:], torch.linalg.qr(w).Q[:, -r:])
    ),
    "singular vectors": _basis(lambda w: torch.linalg.svd(w)[0]),
    "divided by the scale": _made(lambda a, b, s: (a / s, b)),
    "the base keeps all": (Factors, "settle", lambda self, host, name: None),
    "the base gives up B A without s": (
        Factors, "residual", lambda self, stored: stored - self.site.stored(self.B0 @ self.A0)
    ),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_fewer_steps_are_needed,
    functools.partial(test_factors_are_those_of_the_weight_and_the_start_is_the_base, "llama"),
    lines=BROKEN,
)
