"""(IA)³: a model whose keys, values and inner activations were rescaled is recovered by training scales alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch.nn import functional as F

import adapterlab as al
from adapterlab.errors import TargetError


def measure(model: Any, steps: int = 60) -> float:
    """The final divergence from a rescaled teacher, as a share of the first."""
    torch.manual_seed(0)
    host = al.attach(model, al.IA3())
    layers: Any = host.adapters("default")
    truth = {
        path: 0.5 + 1.5 * torch.rand(layer.site.shape[path.endswith("down_proj")]) for path, layer in layers.items()
    }
    ids = torch.randint(3, 128, (16, 12))
    handles = [
        layer.site.module.register_forward_pre_hook(lambda _, args, q=truth[path]: (args[0] * q,))
        if path.endswith("down_proj")
        else layer.site.module.register_forward_hook(lambda _, args, y, q=truth[path]: y * q)
        for path, layer in layers.items()
    ]
    with torch.no_grad():
        target = model(ids).logits.log_softmax(-1)
    for handle in handles:
        handle.remove()
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.05)
    losses = []
    for _ in range(steps):
        loss = F.kl_div(model(ids).logits.log_softmax(-1), target, log_target=True, reduction="batchmean")
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[-1] / losses[0]


def test_a_rescaled_model_is_recovered(tiny: Any) -> None:
    assert measure(tiny("llama")) < 0.05


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert-classes", "t5", "vit", "mixtral"])
def test_start_count_formula_and_merge(family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.IA3())
    assert torch.equal(logits(model, batch), base)
    layers: Any = host.adapters("default")
    assert {layer.site.role for layer in layers.values()} <= {"k", "v", "qkv", "down"}
    count = sum(layer.site.shape[1 if layer.site.role == "down" else 0] for layer in layers.values())
    assert host.summary().trainable == count
    host.verify(batch)
    randomise(host)
    for layer in layers.values():
        site, scales = layer.site, layer.l.flatten().double()
        x = torch.randn(3, site.shape[1])
        bias = 0 if site.bias is None else site.bias.double()
        weight = site.weight().double()
        down = site.role == "down"
        expected = (x * scales) @ weight.T + bias if down else scales * (x.double() @ weight.T + bias)
        assert (site.module(x) - expected).abs().max() < 1e-4
    live = logits(model, batch)
    assert (live - base).abs().max() > 0.01
    host.merge()
    assert (logits(model, batch) - live).abs().max() < 1e-4


def test_explicit_targets_must_all_exist(tiny: Any) -> None:
    with pytest.raises(TargetError, match=r"'k' matches no module.*qkv"):
        al.attach(tiny("gpt2"), al.IA3(targets=["k", "down"]))


LAYER, AROUND = al.IA3.Layer, al.IA3.Layer.around


def _bias_spared(self: Any, run: Any, x: Any) -> Any:
    y, fixed = AROUND(self, run, x), run(0 * x)
    return y if self.on_input else y + fixed - self.scaled(fixed)


def _other_side(layer: Any, method: Any) -> None:
    layer.on_input = not layer.on_input
    side = layer.site.shape[1 if layer.on_input else 0]
    layer.l = torch.nn.Parameter(torch.ones((1, side) if layer.on_input else (side, 1)))


BROKEN: dict[str, Mutation] = {
    "the wrong side": begun(LAYER, _other_side),
    "the outputs always": begun(LAYER, lambda layer, method: layer.on_input and _other_side(layer, method)),
    "the bias not scaled": (LAYER, "around", _bias_spared),
    "starts at zero": begun(LAYER, lambda layer, method: layer.l.zero_()),
    "scaled by 1 + l": (LAYER, "scaled", lambda self, x: x * (1 + self.l.flatten())),
    "scaled twice": (LAYER, "scaled", lambda self, x: x * self.l.flatten() ** 2),
    "one scale for all": (LAYER, "scaled", lambda self, x: x * self.l.mean()),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_start_count_formula_and_merge, "qwen2"), lines=BROKEN
)
