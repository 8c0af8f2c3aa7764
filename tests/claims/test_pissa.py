"""PiSSA's claim: taking the strongest directions out of a weight leaves one that quantization hurts less."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import AttachError
from adapterlab.methods.low_rank._factors import Factors
from adapterlab.methods.low_rank._normal_float import quantized
from adapterlab.methods.low_rank._starts import balanced
from adapterlab.methods.low_rank.pissa import PiSSAStart

WIDTH = 96


def weight_with_decay() -> Tensor:
    """A weight whose singular values are i^(-1/2)."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q for _ in range(2))
    return left * torch.arange(1, WIDTH + 1).pow(-0.5) @ right.T


def measure(r: int, init: Any = "pissa") -> float:
    """The error of NF4 when only the base is quantized and the factors are not, over that of plain NF4."""
    weight = weight_with_decay()
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    host = al.attach(model, al.PiSSA(r=r, alpha=2 * r, targets=["0"], init=init))
    layer: Any = host.adapters("default")["0"]
    error = weight - quantized(model[0].weight.detach(), 4, 64) - layer.delta().detach()
    return float(error.norm() / (weight - quantized(weight, 4, 64)).norm())


def holds() -> bool:
    errors = [measure(r) for r in (4, 8, 24)]
    return errors[0] < 0.95 and errors[0] > errors[1] > errors[2] and errors[2] < 0.7


def test_what_is_left_of_the_weight_is_quantized_with_less_error() -> None:
    assert holds()


def test_the_fast_decomposition_is_nearly_as_good() -> None:
    assert measure(24, {"name": "pissa", "niter": 8}) < 1.05 * measure(24)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classes", "t5", "vit", "mixtral"])
@pytest.mark.parametrize("init", ["pissa", {"name": "pissa", "niter": 2}])
def test_the_start_is_the_base_and_the_original_comes_back(
    family: str, init: Any, tiny: Any, batch_for: Any, logits: Any
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    before, state = logits(model, batch), {k: v.clone() for k, v in model.state_dict().items()}
    host = al.attach(model, al.PiSSA(r=4, alpha=3, init=init))
    assert (logits(model, batch) - before).abs().max() < 2e-5
    layers = host.adapters("default").values()
    assert host.summary().trainable == sum(4 * sum(layer.site.shape) for layer in layers)
    for layer in layers:
        assert not torch.equal(layer.site.module.weight, state[f"{layer.site.path}.weight"])
    with host.using():
        assert torch.equal(logits(model, batch), before)
    host.detach("default")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_the_factors_are_the_singular_triplets() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9))
    weight = model[0].weight.detach().double()
    host = al.attach(model, al.PiSSA(r=3, alpha=12, targets=["0"]))
    layer: Any = host.adapters("default")["0"]
    s = torch.linalg.svdvals(weight)
    assert torch.allclose(torch.linalg.svdvals(layer.delta().double())[:3], s[:3], atol=1e-5)
    assert torch.allclose(layer.A.double().norm(dim=1), (s[:3] / 4).sqrt(), atol=1e-5)
    assert torch.allclose(layer.B.double().norm(dim=0), (s[:3] / 4).sqrt(), atol=1e-5)
    assert torch.allclose(torch.linalg.svdvals(model[0].weight.double())[:6], s[3:], atol=1e-5)


@pytest.mark.parametrize("target", ["head", "embed"])
def test_a_tied_weight_is_refused(target: str, tiny: Any) -> None:
    model = tiny("llama-tied")
    with pytest.raises(AttachError, match=r"tied.*Exclude"):
        al.attach(model, al.PiSSA(r=2, targets=[target]))
    assert al.host(model) is None


def test_two_adapters_cannot_replace_one_weight_at_once(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.PiSSA(r=2, targets=["q"]), "one")
    with pytest.raises(AttachError, match="one"):
        host.attach(al.PiSSA(r=2, targets=["q"]), "two")
    host.attach(al.LoRA(r=2, targets=["q"]), "plain")
    host.merge("plain")
    with pytest.raises(AttachError, match="plain"):
        host.activate("plain")
    host.restore("plain")
    with pytest.raises(AttachError, match="rank_pattern"):
        host.attach(al.PiSSA(r=33, targets=["v"]), "large")


def _factors(change: Any) -> Mutation:
    """Factors made of another choice of the triplets, or shared out otherwise."""

    def factors(self: Any, weight: Tensor, r: int, scale: float) -> Any:
        return change(*torch.linalg.svd(weight, full_matrices=False), r, scale)

    return (PiSSAStart, "factors", factors)


BROKEN: dict[str, Mutation] = {
    "the weakest directions": _factors(lambda u, s, vh, r, scale: balanced(u[:, -r:], s[-r:], vh[-r:], scale)),
    "the second directions": _factors(lambda u, s, v, r, c: balanced(u[:, 1 : r + 1], s[1 : r + 1], v[1 : r + 1], c)),
    "all singular values one": _factors(lambda u, s, v, r, c: balanced(u[:, :r], torch.ones(r), v[:r], c)),
    "singular values in B alone": _factors(lambda u, s, vh, r, c: (vh[:r], u[:, :r] * s[:r] / c)),
    "not divided by the scale": _factors(lambda u, s, vh, r, scale: balanced(u[:, :r], s[:r], vh[:r], 1.0)),
    "the base keeps all": (Factors, "settle", lambda self, host, name: None),
    "the base gives up B A without s": (
        Factors, "residual", lambda self, stored: stored - self.site.stored(self.B0 @ self.A0)
    ),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_what_is_left_of_the_weight_is_quantized_with_less_error,
    test_the_factors_are_the_singular_triplets,
    functools.partial(test_the_start_is_the_base_and_the_original_comes_back, "gpt2", "pissa"),
    lines=BROKEN,
)
