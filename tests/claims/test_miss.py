"""MiSS: half of LoRA's parameters at equal rank, and all of them have a gradient from the first step on."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor, nn

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


@pytest.mark.parametrize(("fields", "shape"), [
    ({"r": 4}, (8, 12)), ({"r": 5}, (8, 12)), ({"r": 12}, (8, 12)),
    ({"r": 5, "variant": "mini", "mini_r": 4}, (8, 12)),
    ({"r": 4, "variant": "bat"}, (8, 12)),
])  # fmt: skip
def test_output_is_that_of_the_dense_update(fields: dict[str, Any], shape: tuple[int, int], randomise: Any) -> None:
    """ΔW entry by entry in float64, with a gradient that is the dense one's."""
    out, in_ = shape
    model = nn.Sequential(nn.Linear(in_, out)).double()
    x = torch.randn(2, 3, in_, dtype=torch.float64)
    base = model(x)
    host = al.attach(model, MiSS(**fields, targets=["0"]))
    assert torch.equal(model(x), base)
    randomise(host)
    d, r, w = host.adapters("default")["0"].block, fields["r"], model[0].weight
    if fields.get("variant") == "bat":
        blocks = [[w[p : p + r, q : q + r] for q in range(0, in_, r)] for p in range(0, out, r)]
        dense = torch.cat([torch.cat([b @ d[p] + d[p] for b in row], 1) for p, row in enumerate(blocks)])
    else:
        dense = torch.stack([torch.stack([d[j % r, o % d.shape[1]] for j in range(in_)]) for o in range(out)])
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


LAYER, FORWARD, DELTA = MiSS.Layer, MiSS.Layer.forward, MiSS.Layer.delta


def _half(self: Any, x: Tensor) -> Tensor:
    return FORWARD(self, x * (torch.arange(x.shape[-1]) % 4 < 2))


def _mean(self: Any, x: Tensor) -> Tensor:
    return FORWARD(self, x) / (x.shape[-1] / self.block.shape[0])


def _neighbours(self: Any, x: Tensor) -> Tensor:
    """Shards of entries that stand side by side, as many as there are shards."""
    return FORWARD(self, x) if self.bat else FORWARD(self, x.unflatten(-1, (self.block.shape[0], -1)).mT.flatten(-2))


def _repeated(self: Any, x: Tensor) -> Tensor:
    """D's outputs each repeated in place of all of them in turn."""
    y = FORWARD(self, x)
    if self.bat or self.block.shape[1] == y.shape[-1]:
        return y
    return y.unflatten(-1, (-1, self.block.shape[1])).mT.flatten(-2)


def _of_blocks(change: Any) -> Mutation:
    """Another update of blocks, made of those of the weight `[p, q, r, r]` and D `[p, 1, r, r]`."""

    def delta(self: Any) -> Tensor:
        if not self.bat:
            return DELTA(self)
        (out, in_), r = self.site.shape, self.block.shape[-1]
        blocks = self.site.unmerged.weight().detach().reshape(out // r, r, in_ // r, r).transpose(1, 2)
        made: Tensor = change(blocks, self.block.unsqueeze(1)).transpose(1, 2).reshape(out, in_)
        return made

    return (LAYER, "delta", delta)


BROKEN: dict[str, Mutation] = {
    "a part of each shard lost": (LAYER, "forward", _half),
    "a mean in place of the sum": (LAYER, "forward", _mean),
    "shards of neighbours": (LAYER, "forward", _neighbours),
    "outputs repeated one by one": (LAYER, "forward", _repeated),
    "merged transposed": (LAYER, "delta", lambda self: DELTA(self).flip(1)),
    "D does not start at zero": begun(LAYER, lambda layer, method: layer.block.fill_(0.1)),
    "D W": _of_blocks(lambda w, d: d @ w + d),
    "W D alone": _of_blocks(lambda w, d: w @ d),
    "D alone": _of_blocks(lambda w, d: w * 0 + d),
    "one D for all outputs": _of_blocks(lambda w, d: w @ d[:1] + d[:1]),
    "the base gets a gradient of D": _of_blocks(lambda w, d: w @ d.detach() + d),
}  # fmt: skip
CASES: list[tuple[dict[str, Any], tuple[int, int]]] = [
    ({"r": 4}, (8, 12)), ({"r": 6, "variant": "mini", "mini_r": 4}, (8, 12)), ({"r": 4, "variant": "bat"}, (8, 12))
]  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    *(functools.partial(test_output_is_that_of_the_dense_update, *case) for case in CASES), test_claim, lines=BROKEN
)
