"""LoRA+'s claim: at one rate for both factors A contributes less the wider the layer; its own rates repair that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import nn

import adapterlab as al
from adapterlab.optim import adamw


def optimizer(host: Any, lr: float) -> Any:
    return host.methods["default"].optimizer(host, "default", lambda groups: adamw(groups, lr=lr))


def share(width: int, method: Any, lr_of_b: float = 0.01) -> float:
    """The change of the output through A over that through B in the second of two steps by the gradient's sign."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    host = al.attach(model, method)
    layer: Any = host.adapters("default")["0"]
    x, target = torch.randn(1, width), torch.randn(1, width)
    groups = {id(p): g["lr"] for g in optimizer(host, 1.0).param_groups for p in g["params"]}
    unit = lr_of_b / groups[id(layer.B)]  # the rate of B is the same at every width
    steps = []
    for _ in range(2):
        model.zero_grad()
        (model(x) - target).square().sum().backward()
        steps.append({k: -unit * groups[id(p)] * p.grad.sign() for k, p in (("A", layer.A), ("B", layer.B))})
        a, b = layer.A.detach().clone(), layer.B.detach().clone()
        with torch.no_grad():
            layer.A += steps[-1]["A"]
            layer.B += steps[-1]["B"]
    through_a = b @ steps[1]["A"] @ x.T
    through_b = steps[1]["B"] @ a @ x.T
    return float(through_a.norm() / through_b.norm())


def plus(width: int) -> Any:
    return al.LoRAPlus(r=4, targets=["0"], ratio=width / 8)


def holds(method: Any) -> bool:
    """The share hardly depends on the width."""
    return share(512, method(512)) / share(64, method(64)) < 1.5


def test_the_factors_keep_pace_at_every_width() -> None:
    assert holds(plus)


def test_at_one_rate_they_do_not() -> None:
    assert not holds(lambda width: al.LoRA(r=4, targets=["0"]))


def test_every_tensor_is_in_its_group(tiny: Any) -> None:
    method = al.LoRAPlus(r=2, targets=["embed", "q"], ratio=20, bias="lora_only", lora_bias=True,
                         modules_to_save=["lm_head"])  # fmt: skip
    host = al.attach(tiny("qwen2"), method)
    made = method.optimizer(host, "default", lambda groups: adamw(groups, lr=1e-3, weight_decay=0.1))
    found = {id(p): (g["lr"], g["weight_decay"]) for g in made.param_groups for p in g["params"]}
    for key, p in host.named_parameters("default").items():
        if "embed" in key:
            wanted = (1e-6, 0.1)
        elif p.dim() == 1:
            wanted = (20e-3, 0.0)
        elif key.endswith(".B"):
            wanted = (20e-3, 0.1)
        else:
            wanted = (1e-3, 0.1)
        assert found.pop(id(p)) == pytest.approx(wanted), key
    assert not found


def test_the_schedule_scales_every_rate(tiny: Any) -> None:
    host = al.attach(tiny("llama"), al.LoRAPlus(r=2, targets=["q"], ratio=8))
    made = optimizer(host, 1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5)
    assert sorted(schedule.get_last_lr()) == pytest.approx([0.5e-3, 4e-3])


OPTIMIZER = al.LoRAPlus.optimizer


def _groups(change: Any) -> Mutation:
    """The groups with the options that `change` makes of theirs."""

    def optimizer(self: Any, host: Any, name: str, make: Any) -> Any:
        return OPTIMIZER(self, host, name, lambda groups: make([{**g, **change(self, g)} for g in groups]))

    return (al.LoRAPlus, "optimizer", optimizer)


def _swapped(self: Any, group: Any) -> dict[str, float]:
    slow = "lr" not in group and "lr_factor" not in group
    return {"lr_factor": self.ratio if slow else 1.0}


BROKEN: dict[str, Mutation] = {
    "the rates swapped": _groups(_swapped),
    "one rate for all": _groups(lambda self, group: {"lr_factor": 1.0}),
    "the root of the ratio": _groups(lambda self, g: {"lr_factor": self.ratio**0.5} if "lr_factor" in g else {}),
    "embeddings as fast as B": _groups(lambda self, g: {"lr": 1e-3 * self.ratio} if "lr" in g else {}),
    "biases decay": _groups(lambda self, g: {"weight_decay": 0.1}),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_the_factors_keep_pace_at_every_width, test_every_tensor_is_in_its_group, lines=BROKEN
)
