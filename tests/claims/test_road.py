"""RoAd: adapters of one batch cost O(out) a token and give what separate runs give; the rotation merges."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError
from adapterlab.methods.multiplicative import road
from adapterlab.methods.multiplicative.road import RoAd

VARIANTS = ["road_1", "road_2", "road_4"]


def measure(tiny, randomise) -> tuple[float, int]:
    """(largest difference between a batch of eight adapters and eight runs, matrix products added to one run)."""
    model = tiny("llama")
    names = [f"a{i}" for i in range(8)]
    ids = torch.randint(3, 128, (8, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), FlopCounterMode(display=False) as base:
        model(ids)
    host = al.attach(model, RoAd(group_size=8, variant=VARIANTS[0]), names[0])
    for i, name in enumerate(names[1:], 1):
        host.attach(RoAd(group_size=8, variant=VARIANTS[i % 3]), name)
    for i, name in enumerate(names):
        randomise(host, name, seed=i)
    with torch.no_grad():
        with host.rows(names):
            together = model(ids).logits
        apart = []
        for i, name in enumerate(names):
            with host.using(name):
                apart.append(model(ids[i : i + 1]).logits)
        with host.using(names[0]), FlopCounterMode(display=False) as one:
            model(ids)
    return float((together - torch.cat(apart)).abs().max()), one.get_total_flops() - base.get_total_flops()


def test_claim_mixed_batches_are_exact_and_free_of_matrix_products(tiny, randomise):
    difference, added = measure(tiny, randomise)
    assert difference < 1e-4
    assert added == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_is_the_product_with_the_block_matrix(variant):
    """R is built entry by entry in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 24)).double()
    host = al.attach(model, RoAd(variant=variant, group_size=8, targets=["0"]))
    layer = host.adapters("default")["0"]
    with torch.no_grad():
        layer.theta.normal_()
        layer.alpha.normal_()
    R = torch.zeros(24, 24, dtype=torch.float64)
    for g in range(3):
        for k in range(4):
            i, j = 8 * g + k, 8 * g + k + 4
            place = {
                "road_1": (4 * g + k,) * 4,
                "road_2": (i, i, j, j),
                "road_4": (16 * g + k, 16 * g + 8 + k, 16 * g + 4 + k, 16 * g + 12 + k),
            }[variant]
            (c1, t1, c2, t2) = [(layer.alpha[p].item(), layer.theta[p].item()) for p in place]
            R[i, i], R[i, j] = c1[0] * math.cos(c1[1]), -t1[0] * math.sin(t1[1])
            R[j, i], R[j, j] = t2[0] * math.sin(t2[1]), c2[0] * math.cos(c2[1])
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = (x @ model[0].weight.T + model[0].bias) @ R.T
    assert torch.allclose(model(x), expected, atol=1e-12)
    host.merge()
    assert torch.allclose(model(x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-classes", "t5"])
def test_starts_at_the_base_trains_and_merges(tiny, batch_for, logits, randomise, kind):
    model = tiny(kind)
    batch = batch_for(model)
    before = logits(model, batch)
    host = al.attach(model, RoAd(group_size=8))
    assert torch.equal(logits(model, batch), before)
    host.verify(batch)
    randomise(host)
    live = logits(model, batch)
    assert not torch.allclose(live, before, atol=1e-2)
    host.merge()
    assert torch.allclose(logits(model, batch), live, atol=1e-3)
    host.detach("default")
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize(("variant", "factor"), [("road_1", 1), ("road_2", 2), ("road_4", 4)])
def test_trainable_count_is_the_formula(tiny, variant, factor):
    host = al.attach(tiny("llama"), RoAd(group_size=8, variant=variant))
    outputs = sum(a.site.shape[0] for a in host.adapters("default").values())
    assert host.summary().trainable == factor * outputs


def test_factors_that_start_at_one_are_not_decayed(tiny):
    for method, leaf in ((RoAd(group_size=8, targets=["q"]), "alpha"), (al.IA3(), "l")):
        host = al.attach(tiny("llama"), method)
        groups = []
        method.optimizer(host, "default", groups.extend)
        exempt = {id(p) for group in groups if group.get("weight_decay") == 0.0 for p in group["params"]}
        named = host.named_parameters("default")
        assert exempt == {id(p) for key, p in named.items() if key.endswith(f".{leaf}")}
        assert sum(len(group["params"]) for group in groups) == len(named)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"group_size = 7 .*pairs; use 8"):
        RoAd(group_size=7)
    with pytest.raises(AttachError, match=r"64 does not divide a target's 48 outputs; group_size=16 fits"):
        al.attach(nn.Sequential(nn.Linear(4, 48)), RoAd(targets=["0"]))
    with pytest.raises(AttachError, match=r"5 outputs; .*exclude it"):
        al.attach(nn.Sequential(nn.Linear(4, 5)), RoAd(targets=["0"]))


LAYER, TURNS, AROUND, SWAPPED = RoAd.Layer, RoAd.Layer.turns, RoAd.Layer.around, road._swapped


def _turns(change: Any) -> Mutation:
    """Other factors, made of c and t."""
    return (LAYER, "turns", lambda self: change(*TURNS(self)))


def _neighbours(y: Tensor, half: int) -> Tensor:
    """Pairs of outputs that stand side by side."""
    return y.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _wrong_rows(self: Any, calls: Any = itertools.count()) -> Any:  # noqa: B008
    return tuple((1 + next(calls) % 3) * factor for factor in TURNS(self))


def _dense(self: Any, run: Any, x: Tensor) -> Tensor:
    y: Tensor = AROUND(self, run, x)
    return y @ torch.eye(y.shape[-1], dtype=y.dtype)


BROKEN: dict[str, Mutation] = {
    "rows get other factors": (LAYER, "turns", _wrong_rows),
    "a dense product": (LAYER, "around", _dense),
    "turned the other way": _turns(lambda c, t: (c, -t)),
    "sine and cosine exchanged": _turns(lambda c, t: (t, c)),
    "no rotation": _turns(lambda c, t: (c, 0 * t)),
    "no scaling": _turns(lambda c, t: (c / (c**2 + t**2).sqrt(), t / (c**2 + t**2).sqrt())),
    "the halves of c exchanged": _turns(lambda c, t: (c.flip(1), t)),
    "the halves of t exchanged": _turns(lambda c, t: (c, t.flip(1))),
    "pairs of neighbours": (road, "_swapped", _neighbours),
    "the input turned": (LAYER, "around", lambda self, run, x: run(x) + AROUND(self, run, 0 * x) - run(0 * x)),
    "alpha starts at zero": begun(LAYER, lambda layer, method: layer.alpha.zero_()),
    "theta does not start at zero": begun(LAYER, lambda layer, method: layer.theta.fill_(0.1)),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    *(functools.partial(test_output_is_the_product_with_the_block_matrix, variant) for variant in VARIANTS),
    functools.partial(test_starts_at_the_base_trains_and_merges, kind="llama"),
    test_claim_mixed_batches_are_exact_and_free_of_matrix_products,
    lines=BROKEN,
)
