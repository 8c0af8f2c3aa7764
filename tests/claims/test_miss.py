"""MiSS: half of LoRA's parameters at equal rank, and all of them have a gradient from the first step on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adapterlab as al
from adapterlab.errors import AttachError
from adapterlab.methods.structured.miss import MiSS


def measure() -> tuple[float, float, float]:
    """(parameters over LoRA's, share of trained numbers with a gradient at the start, the same for LoRA)."""
    found = []
    for method in (MiSS(r=4, targets=["0"]), al.LoRA(r=4, targets=["0"])):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32))
        host = al.attach(model, method)
        x = torch.randn(8, 32)
        model(x).square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in host.parameters("default")])
        found.append((len(grads), float((grads != 0).float().mean())))
    (count, moving), (budget, lora) = found
    return count / budget, moving, lora


def test_claim() -> None:
    assert measure() == (0.5, 1.0, 0.5)


def test_claim_fails_when_a_part_of_each_shard_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = MiSS.Layer.forward
    monkeypatch.setattr(MiSS.Layer, "forward", lambda self, x: plain(self, x * (torch.arange(32) % 4 < 2)))
    assert measure() != (0.5, 1.0, 0.5)


@pytest.mark.parametrize(("fields", "shape"), [
    ({"r": 4}, (8, 12)), ({"r": 5}, (8, 12)), ({"r": 12}, (8, 12)),
    ({"r": 5, "variant": "mini", "mini_r": 4}, (8, 12)),
    ({"r": 4, "variant": "bat"}, (8, 12)),
])  # fmt: skip
def test_output_is_that_of_the_dense_update(fields: dict[str, Any], shape: tuple[int, int], randomise: Any) -> None:
    """ΔW entry by entry in float64, with a gradient that is the dense one's."""
    out, in_ = shape
    model = nn.Sequential(nn.Linear(in_, out)).double()
    host = al.attach(model, MiSS(**fields, targets=["0"]))
    randomise(host)
    d, r, w = host.adapters("default")["0"].block, fields["r"], model[0].weight
    if fields.get("variant") == "bat":
        blocks = [[w[p : p + r, q : q + r] for q in range(0, in_, r)] for p in range(0, out, r)]
        dense = torch.cat([torch.cat([b @ d[p] + d[p] for b in row], 1) for p, row in enumerate(blocks)])
    else:
        dense = torch.stack([torch.stack([d[j % r, o % d.shape[1]] for j in range(in_)]) for o in range(out)])
    x = torch.randn(2, 3, in_, dtype=torch.float64)
    expected = x @ (w + dense).T + model[0].bias
    assert torch.allclose(model(x), expected, atol=1e-12)
    seed = torch.randn_like(expected)
    (found,), (wanted,) = (torch.autograd.grad(y, d, seed) for y in (model(x), expected))
    assert torch.allclose(found, wanted, atol=1e-10)
    host.merge()
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_bat_ignores_what_else_is_merged(randomise: Any) -> None:
    """Two adapters merged in turn give what they give live."""
    model = nn.Sequential(nn.Linear(8, 8))
    host = al.attach(model, al.LoRA(r=2, targets=["0"]), "first")
    host.attach(MiSS(r=4, variant="bat", targets=["0"]), "second")
    randomise(host)
    x = torch.randn(3, 8)
    live = model(x)
    host.merge("first")
    assert torch.allclose(model(x), live, atol=1e-5)
    host.merge("second")
    assert torch.allclose(model(x), live, atol=1e-5)


@pytest.mark.parametrize(("fields", "count"), [
    ({}, 8 * 48), ({"variant": "mini", "mini_r": 16}, 8 * 16), ({"variant": "bat"}, 8 * 48)
])  # fmt: skip
def test_trainable_count_is_the_formula(fields: dict[str, Any], count: int, tiny: Any) -> None:
    host = al.attach(tiny("llama"), MiSS(r=8, targets=["up"], **fields))
    assert host.summary().trainable == 2 * count


def test_dropout_acts_in_training_only(randomise: Any) -> None:
    model = nn.Sequential(nn.Linear(12, 8))
    host = al.attach(model, MiSS(r=4, dropout=0.5, targets=["0"]))
    randomise(host)
    x = torch.ones(64, 12)
    eager, dropped = model.eval()(x), model.train()(x)
    assert len(eager.unique(dim=0)) == 1
    assert len(dropped.unique(dim=0)) > 10


def test_sizes_that_do_not_divide_are_refused(tiny: Any) -> None:
    with pytest.raises(AttachError, match="r = 64 is more than the 32 inputs"):
        al.attach(tiny("llama"), MiSS())
    with pytest.raises(AttachError, match="mini_r = 5 does not divide the 32 outputs"):
        al.attach(tiny("llama"), MiSS(r=8, variant="mini", mini_r=5))
    with pytest.raises(AttachError, match=r"blocks of r = 12.*\[32, 32\].*Choose an r that divides both"):
        al.attach(tiny("llama"), MiSS(r=12, variant="bat"))
