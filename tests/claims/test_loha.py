"""LoHa: the rank reaches r² where LoRA with as many parameters reaches 2 r; nothing dense is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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


def test_claim_fails_for_a_sum_of_the_products(randomise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoHa.Layer, "delta", lambda self: self.w1_a @ self.w1_b + self.w2_a @ self.w2_b)
    assert measure(randomise) != (16, 8)


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
