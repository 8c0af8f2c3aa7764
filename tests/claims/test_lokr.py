"""LoKr: a Kronecker product with a thin factor fits what LoRA with the same budget cannot."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import TargetError
from adapterlab.methods.structured import _kronecker, lokr
from adapterlab.methods.structured.lokr import LoKr


def train(method: Any, update: Tensor, steps: int = 300) -> tuple[float, int]:
    """Fit W + update on white inputs: (final loss / first, trained parameters)."""
    torch.manual_seed(1)
    layer = nn.Linear(update.shape[1], update.shape[0], bias=False)
    weight = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    host = al.attach(model, method)
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.03)
    eye = torch.eye(update.shape[1])
    losses = []
    for _ in range(steps):
        loss = (model(eye) - (weight + update).T).square().sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[-1] / losses[0], host.summary().trainable


def measure() -> tuple[float, float]:
    """(loss left by LoKr, by LoRA with at least as many parameters) for w1 ⊗ w2, w2 of rank 2."""
    draw = torch.Generator().manual_seed(0)
    w1 = torch.randn(8, 8, generator=draw)
    w2 = torch.randn(12, 2, generator=draw) @ torch.randn(2, 12, generator=draw)
    target = torch.kron(w1, w2) / 10
    ours, count = train(LoKr(r=2, alpha=2, targets=["0"]), target)
    lora, budget = train(al.LoRA(r=1, targets=["0"]), target)
    assert count == 64 + 48 <= budget
    return ours, lora


def holds() -> bool:
    ours, lora = measure()
    return ours < 0.01 and lora > 0.6


def test_claim() -> None:
    assert holds()


@pytest.mark.parametrize(("fields", "count"), [
    ({"r": 2}, 4 * 4 + 2 * (6 + 5)),
    ({"r": 3}, 4 * 4 + 6 * 5),
    ({"r": 1, "decompose_both": True, "factor": 4}, 1 * (4 + 4) + 1 * (6 + 5)),
    ({"r": 1, "factor": 2}, 2 * 2 + 1 * (12 + 10)),
])  # fmt: skip
def test_output_and_count_are_those_of_the_dense_product(fields: dict[str, Any], count: int, randomise: Any) -> None:
    model = nn.Sequential(nn.Linear(20, 24)).double()
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    before, base = model(x), model[0].weight
    host = al.attach(model, LoKr(**fields, alpha=3, targets=["0"]))
    assert host.summary().trainable == count
    assert torch.equal(model(x), before)
    randomise(host)
    layer = host.adapters("default")["0"]
    p = dict(layer.named_parameters())
    w1 = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
    w2 = p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"]
    expected = x @ (base + 3 / fields["r"] * torch.kron(w1, w2)).T + model[0].bias
    assert torch.allclose(model(x), expected, atol=1e-12)
    host.merge()
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_the_factor_rule_is_that_of_peft() -> None:
    from peft.tuners.lokr.layer import factorization

    cases = [(size, factor) for size in range(1, 130) for factor in (-1, *range(1, 40))]
    assert all(_kronecker.split(*case) == factorization(*case) for case in cases)


@pytest.mark.parametrize("start", ["peft", "lycoris"])
def test_every_start_is_the_base_and_learns(start: Any, tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("llama")
    batch = batch_for(model)
    before = logits(model, batch)
    host = al.attach(model, LoKr(r=2, decompose_both=True, factor=8, start=start))
    assert torch.equal(logits(model, batch), before)
    host.verify(batch)
    model(**batch).loss.backward()
    assert any(bool(p.grad.any()) for p in host.parameters("default"))


@pytest.mark.parametrize("rescale", [False, True])
def test_rank_dropout_drops_whole_rows_of_the_update(rescale: bool, randomise: Any) -> None:
    model = nn.Sequential(nn.Linear(20, 40, bias=False))
    host = al.attach(model, LoKr(r=2, rank_dropout=0.5, rescale=rescale, targets=["0"]))
    randomise(host)
    x = torch.randn(6, 20)
    share = model.eval()(x) - x @ model[0].weight.T
    dropped = model.train()(x) - x @ model[0].weight.T
    kept = dropped.abs().amax(0) > 1e-6
    assert 5 < int(kept.sum()) < 35
    factor = 1 / kept.float().mean() if rescale else 1.0
    assert torch.allclose(dropped[:, kept], factor * share[:, kept], atol=1e-4)


def test_module_dropout_leaves_the_update_out_of_a_call(randomise: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40, bias=False))
    host = al.attach(model, LoKr(r=2, module_dropout=0.5, targets=["0"]))
    randomise(host)
    x = torch.randn(3, 20)
    base, full = x @ model[0].weight.T, model.eval()(x)
    calls = [model.train()(x) for _ in range(30)]
    without = sum(torch.allclose(y, base, atol=1e-6) for y in calls)
    assert 5 < without < 25
    assert without + sum(torch.allclose(y, full, atol=1e-6) for y in calls) == 30


def test_a_pattern_that_matches_nothing_is_named(tiny: Any) -> None:
    with pytest.raises(TargetError, match=r"lokr: rank_pattern names 'q_prj'.*q_proj"):
        al.attach(tiny("llama"), LoKr(targets=["q", "v"], rank_pattern={"q_prj": 2}))


LAYER, SIDES, MAKE, SPLIT = LoKr.Layer, LoKr.Layer.sides, LoKr.Layer._make, _kronecker.split
FIELDS: list[tuple[dict[str, Any], int]] = [
    ({"r": 2}, 38), ({"r": 1, "decompose_both": True, "factor": 4}, 19), ({"r": 1, "factor": 2}, 26)
]  # fmt: skip


def _whole(self: Any, name: str, shape: Any, r: Any, *rest: Any) -> Any:
    return MAKE(self, name, shape, None, *rest)


def _always_thin(self: Any, name: str, shape: Any, r: Any, *rest: Any) -> Any:
    return MAKE(self, name, shape, 1, *rest)


BROKEN: dict[str, Mutation] = {
    "the product the other way round": (LAYER, "sides", lambda self: SIDES(self)[::-1]),
    "the thin factor cut to one rank": (
        LAYER, "sides", lambda self: (SIDES(self)[0], [SIDES(self)[1][0][:, :1], SIDES(self)[1][-1][:1]])
    ),
    "s left out": (LoKr, "scaling", lambda self, path: 1.0),
    "alpha alone": (LoKr, "scaling", lambda self, path: self.alpha),
    "s left out of the merge": (LAYER, "delta", lambda self: _kronecker.KroneckerLayer.delta(self) / self.scale),
    "whole factors": (LAYER, "_make", _whole),
    "w1 thin too": (LAYER, "_make", _always_thin),
    "the factor ignored": (lokr, "split", lambda size, factor=-1: SPLIT(size)),
    "w1 does not start at zero": begun(LAYER, lambda p, method: p.get_parameter(p.names[0][0]).fill_(1)),
    "all starts at zero": begun(LAYER, lambda p, method: [value.zero_() for value in p.parameters()]),
    "dropped rows are rescaled always": begun(LAYER, lambda layer, method: setattr(layer, "rescales", True)),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    *(functools.partial(test_output_and_count_are_those_of_the_dense_product, *fields) for fields in FIELDS),
    functools.partial(test_every_start_is_the_base_and_learns, "peft"),
    functools.partial(test_rank_dropout_drops_whole_rows_of_the_update, False),
    lines=BROKEN,
)
