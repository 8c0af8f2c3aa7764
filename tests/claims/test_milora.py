"""MiLoRA's claim: training the weakest directions leaves the strongest of the weight as they were."""

from __future__ import annotations

from typing import Any

import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.methods.low_rank._factors import Factors
from adapterlab.methods.low_rank._starts import balanced
from adapterlab.methods.low_rank.milora import MiLoRAStart

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
        for norms in (layer.A.norm(dim=1), layer.B.norm(dim=0)):
            assert torch.allclose(norms, (s[-4:] / 2.5).sqrt(), atol=1e-3)
    assert host.summary().trainable == sum(4 * sum(a.site.shape) for a in host.adapters("default").values())


def _factors(change: Any) -> Mutation:
    """Factors made of another choice of the triplets, or shared out otherwise."""

    def factors(self: Any, weight: Tensor, r: int, scale: float) -> Any:
        return change(*torch.linalg.svd(weight, full_matrices=False), r, scale)

    return (MiLoRAStart, "factors", factors)


BROKEN: dict[str, Mutation] = {
    "the strongest directions": _factors(lambda u, s, vh, r, scale: balanced(u[:, :r], s[:r], vh[:r], scale)),
    "not the last ones": _factors(lambda u, s, v, r, c: balanced(u[:, -r - 1 : -1], s[-r - 1 : -1], v[-r - 1 : -1], c)),
    "singular values in B alone": _factors(lambda u, s, vh, r, c: (vh[-r:], u[:, -r:] * s[-r:] / c)),
    "not divided by the scale": _factors(lambda u, s, vh, r, scale: balanced(u[:, -r:], s[-r:], vh[-r:], 1.0)),
    "LoRA's usual start": _factors(lambda u, s, vh, r, c: (vh[-r:], 0 * u[:, -r:])),
    "the base keeps all": (Factors, "settle", lambda self, host, name: None),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_the_strongest_directions_are_kept, test_the_last_of_the_shorter_side_are_taken, lines=BROKEN
)
