"""LoRA's claim: an update of rank r recovers a change of rank r, and no more than that."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import nn
from torch.nn import functional as F

import adapterlab as al

WIDTH, RANK = 24, 4


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def excess(r: int) -> float:
    """Remaining share of the initial loss against a teacher that differs by rank 4 with equal singular values."""
    torch.manual_seed(0)
    student = Regression()
    left, right = (torch.linalg.qr(torch.randn(WIDTH, RANK)).Q for _ in range(2))
    change = left @ right.T
    host = al.attach(student, al.LoRA(r=r, alpha=float(r), targets=["layer"], init="gaussian"))
    eye = torch.eye(WIDTH)
    base = student.layer.weight.detach()
    teacher = base + change

    def loss() -> torch.Tensor:
        # The expected squared error over standard normal inputs is the squared difference of the weights, and the
        # forward pass shows the student's weight when it is given the identity.
        return (student(eye).T - teacher).square().sum()

    assert torch.equal(student(eye).T, base)  # the start changes nothing
    optimizer = torch.optim.Adam(host.parameters("default"), 0.05)
    initial = loss().item()
    for _ in range(200):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    return value.item() / initial


def test_the_rank_decides_what_can_be_learned() -> None:
    assert excess(4) < 0.01
    assert 0.50 - 1e-4 <= excess(2) <= 0.60  # two of four equal singular values: half is the floor


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-masked"])
def test_merged_and_live_outputs_agree(family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny(family)
    host = al.attach(model, al.LoRA(r=4))
    randomise(host, size=0.05)
    live = logits(model, batch_for(model))
    host.merge()
    assert (logits(model, batch_for(model)) - live).abs().max() < 1e-5


def test_parameters_are_r_times_in_plus_out() -> None:
    for r in (1, 3, 8):
        host = al.attach(Regression(), al.LoRA(r=r, targets=["layer"]))
        assert host.summary().trainable == r * 2 * WIDTH


@pytest.mark.parametrize(("family", "targets"), [("qwen2", "all-linear"), ("gpt2", "all-linear"), ("llama", "embed")])
def test_the_formula_in_float64(family: str, targets: str, tiny: Any, randomise: Any) -> None:
    host = al.attach(tiny(family), al.LoRA(r=3, alpha=5, targets=[targets], lora_bias=targets == "all-linear"))
    randomise(host)
    for layer in host.adapters("default").values():
        site: Any = layer.site
        x = torch.randn(4, site.shape[1]) if site.kind == "linear" else torch.arange(9)
        rows = x.double() if site.kind == "linear" else F.one_hot(x, site.shape[1]).double()
        weight = site.weight().double() + 5 / 3 * layer.B.double() @ layer.A.double()
        bias = (0 if site.bias is None else site.bias.double()) + (0 if layer.bias is None else 5 / 3 * layer.bias)
        assert (site.module(x) - rows @ weight.T - bias).abs().max() < 1e-4


def test_where_it_starts(tiny: Any) -> None:
    """A uniform within 1/√in or normal with deviation 1/r, B zero; for embeddings A zero and B standard normal."""
    for init, limit, std in (("kaiming", 400**-0.5, 1200**-0.5), ("gaussian", 1.0, 1 / 8)):
        model = nn.Sequential(nn.Linear(400, 8))
        layer: Any = al.attach(model, al.LoRA(r=8, targets=["0"], init=init)).adapters("default")["0"]
        assert not layer.B.any()
        assert layer.A.abs().max() <= limit
        assert float(layer.A.std()) == pytest.approx(std, rel=0.05)
        assert layer.A.norm(dim=1).min() > 0
    table: Any = next(iter(al.attach(tiny("llama"), al.LoRA(r=8, targets=["embed"])).adapters("default").values()))
    assert not table.A.any()
    assert float(table.B.std()) == pytest.approx(1, rel=0.2)


def one_rank_short(layer: Any, method: Any) -> None:
    layer.A.register_hook(lambda g: torch.cat([g[:-1], 0 * g[-1:]]))
    layer.B.register_hook(lambda g: torch.cat([g[:, :-1], 0 * g[:, -1:]], 1))


def full_rank(layer: Any, method: Any) -> None:
    layer.extra = nn.Parameter(torch.zeros(layer.site.shape))
    layer.around = lambda run, x: run(x) + x @ layer.extra.T


LAYER, SCALING = al.LoRA.Layer, al.LoRA.scaling
BROKEN: dict[str, Mutation] = {
    "A does not train": begun(LAYER, lambda layer, method: layer.A.requires_grad_(False)),
    "B does not train": begun(LAYER, lambda layer, method: layer.B.requires_grad_(False)),
    "one rank short": begun(LAYER, one_rank_short),
    "full rank": begun(LAYER, full_rank),
    "B does not start at zero": begun(LAYER, lambda layer, method: layer.B.fill_(0.1)),
    "A starts at zero": begun(LAYER, lambda layer, method: layer.A.zero_()),
    "A starts normal": begun(LAYER, lambda layer, method: layer.A.normal_(std=1200**-0.5)),
    "A starts too large": begun(LAYER, lambda layer, method: layer.A.mul_(3**0.5)),
    "s left out": (al.LoRA, "scaling", lambda self, path: 1.0),
    "alpha over the root of r": (al.LoRA, "scaling", lambda self, path: self.alpha / self.r**0.5),
    "s twice": (al.LoRA, "scaling", lambda self, path: SCALING(self, path) ** 2),
    "s left out of the merge": (LAYER, "delta", lambda self: self.B @ self.A),
    "s left out of the bias": (LAYER, "added_bias", property(lambda self: self.bias)),
    "A transposed into B": (LAYER, "factors", lambda self: (self.A.flip(0), self.B)),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_the_formula_in_float64, "qwen2", "all-linear"),
    functools.partial(test_merged_and_live_outputs_agree, "gpt2"),
    test_where_it_starts,
    test_the_rank_decides_what_can_be_learned,
    lines=BROKEN,
)
