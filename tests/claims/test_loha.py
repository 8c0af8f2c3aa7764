"""LoHa: the rank reaches r² where LoRA with as many parameters reaches 2 r; nothing dense is kept."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import nn

import adapterlab as al
from adapterlab.methods.structured.loha import LoHa


def measure(randomise: Any) -> tuple[int, int]:
    """(rank of LoHa's update, of LoRA's) with equal numbers of parameters, at random values."""
    ranks, counts = [], []
    for method in (LoHa(r=4, targets=["0"]), al.LoRA(r=8, targets=["0"])):
        model = nn.Sequential(nn.Linear(32, 24, bias=False)).double()
        host = al.attach(model, method)
        randomise(host)
        with torch.no_grad():
            update = model(torch.eye(32, dtype=torch.float64)).T - model[0].weight
        ranks.append(int(torch.linalg.matrix_rank(update)))
        counts.append(host.summary().trainable)
    assert counts[0] == counts[1] == 2 * 4 * (32 + 24)
    return ranks[0], ranks[1]


def test_claim(randomise: Any) -> None:
    assert measure(randomise) == (16, 8)


def test_output_and_gradients_are_those_of_the_formula(randomise: Any) -> None:
    model = nn.Sequential(nn.Linear(7, 5)).double()
    host = al.attach(model, LoHa(r=2, alpha=3, targets=["0"]))
    randomise(host)
    p = dict(host.adapters("default")["0"].named_parameters())
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    weight = model[0].weight + 1.5 * (p["w1_a"] @ p["w1_b"]) * (p["w2_a"] @ p["w2_b"])
    expected = x @ weight.T + model[0].bias
    assert torch.allclose(model(x), expected, atol=1e-12)
    seed = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, *p.values()], seed)
    for found, want in zip(torch.autograd.grad(model(x), [x, *p.values()], seed), wanted, strict=True):
        assert torch.allclose(found, want, atol=1e-10)
    host.merge()
    assert torch.allclose(model(x), expected, atol=1e-6)


def kept(host: Any, x: torch.Tensor) -> int:
    """Elements that autograd keeps for the backward pass of all layers, besides parameters."""
    held: dict[int, int] = {}
    own = {p.data_ptr() for p in host.model.parameters()}

    def note(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in own:
            held[t.data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        host.model(x)
    return sum(held.values())


def test_no_dense_matrix_is_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    host = al.attach(model, LoHa(r=8, targets=["all-linear"]))  # r² is too much here for thin factors
    x = torch.randn(2, 64)
    assert kept(host, x) < 64 * 64
    monkeypatch.setattr(LoHa.Layer, "forward", LoHa.Layer.product)
    assert kept(host, x) > 4 * 64 * 64  # what the measurement would find otherwise


@pytest.mark.parametrize("r", [2, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_thin_factors_and_the_matrix_give_the_same_output_and_gradients(r: int, bias: bool, randomise: Any) -> None:
    model = nn.Sequential(nn.Linear(48, 80, bias=bias)).double()
    base = model[0].weight.detach().clone()
    host = al.attach(model, LoHa(r=r, alpha=3.0, targets=["0"]))
    randomise(host)
    layer = host.adapters("default")["0"]
    assert layer.thin is (r == 2)
    x = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)
    parts = [x, *host.parameters("default")]
    g = torch.randn(5, 80, dtype=torch.float64)
    found = torch.autograd.grad(model(x), parts, g)
    shift = model[0].bias.detach() if bias else 0.0
    update = 3.0 / r * (layer.w1_a @ layer.w1_b) * (layer.w2_a @ layer.w2_b)
    expected = torch.autograd.grad(x @ (base + update).T + shift, parts, g)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("start", ["peft", "lycoris"])
def test_every_start_is_the_base_and_learns(start: Any, tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("gpt2")
    batch = batch_for(model)
    before = logits(model, batch)
    host = al.attach(model, LoHa(r=2, start=start))
    assert torch.equal(logits(model, batch), before)
    host.verify(batch)
    model(**batch).loss.backward()
    assert any(bool(p.grad.any()) for p in host.parameters("default"))


def test_rank_dropout_divides_by_the_share_kept(randomise: Any) -> None:
    model = nn.Sequential(nn.Linear(20, 40, bias=False))
    host = al.attach(model, LoHa(r=2, rank_dropout=0.5, targets=["0"]))
    randomise(host)
    x = torch.randn(6, 20)
    share = model.eval()(x) - x @ model[0].weight.T
    dropped = model.train()(x) - x @ model[0].weight.T
    rows = dropped.abs().amax(0) > 1e-6
    assert 5 < int(rows.sum()) < 35
    assert torch.allclose(dropped[:, rows], share[:, rows] / rows.float().mean(), atol=1e-4)


def test_where_it_starts() -> None:
    for start, zero, deviations in (
        ("peft", "w2_b", {"w1_a": 1 / 48**0.5, "w1_b": 1 / 1200**0.5, "w2_a": 1 / 48**0.5}),
        ("lycoris", "w2_a", {"w1_a": 0.1, "w1_b": 1.0, "w2_b": 1.0}),
    ):
        torch.manual_seed(0)
        host = al.attach(nn.Sequential(nn.Linear(400, 300)), LoHa(r=16, start=start, targets=["0"]))
        layer = host.adapters("default")["0"]
        assert not layer.get_parameter(zero).any()
        found = {key: float(layer.get_parameter(key).std()) for key in deviations}
        assert found == pytest.approx(deviations, rel=0.05)


LAYER, FACTORS = LoHa.Layer, LoHa.Layer.factors


def _delta(change: Any) -> Mutation:
    """Another ΔW, made of the two products and s, where it is not computed by thin factors."""
    return (LAYER, "delta", lambda p: change(p.w1_a @ p.w1_b, p.w2_a @ p.w2_b, p.scale))


def _other_pairs(self: Any) -> Any:
    found = FACTORS(self)
    return found and ((self.w2_b[:, None] * self.w1_b).flatten(0, 1), found[1])


BROKEN: dict[str, Mutation] = {
    "a sum of the products": _delta(lambda first, second, s: s * (first + second)),
    "one product alone": _delta(lambda first, second, s: s * first),
    "s left out of the matrix": _delta(lambda first, second, s: first * second),
    "s on both products": _delta(lambda first, second, s: s**2 * first * second),
    "alpha alone": (LoHa, "scaling", lambda self, path: self.alpha),
    "other pairs in the thin factors": (LAYER, "factors", _other_pairs),
    "w2_b does not start at zero": begun(LAYER, lambda layer, method: layer.w2_b.normal_()),
    "all starts at zero": begun(LAYER, lambda layer, method: (layer.w2_a.zero_(), layer.w2_b.zero_())),
    "w1_a starts too large": begun(LAYER, lambda layer, method: layer.w1_a.mul_(3)),
    "what is kept is not rescaled": begun(LAYER, lambda layer, method: setattr(layer, "rescales", False)),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_output_and_gradients_are_those_of_the_formula,
    functools.partial(test_thin_factors_and_the_matrix_give_the_same_output_and_gradients, 2, True),
    test_where_it_starts,
    test_rank_dropout_divides_by_the_share_kept,
    functools.partial(test_every_start_is_the_base_and_learns, "lycoris"),
    lines=BROKEN,
)
