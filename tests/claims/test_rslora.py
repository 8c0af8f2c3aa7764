"""rsLoRA's claim: with alpha / √r the gradient of B has the same size at every rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import nn

import adapterlab as al
from adapterlab.errors import ConfigError

WIDTH = 256


def gradient(r: int, scaling: Any) -> float:
    """The norm of the gradient of B at the start, for one random direction of the output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    host = al.attach(model, scaling(r))
    x, g = torch.randn(16, WIDTH), torch.randn(16, WIDTH)
    (model(x) * g).sum().backward()
    return float(host.adapters("default")["0"].B.grad.norm())


def measure(scaling: Any) -> float:
    """How much larger the gradient is at rank 4 than at rank 128."""
    return gradient(4, scaling) / gradient(128, scaling)


def stable(r: int) -> Any:
    return al.RsLoRA(r=r, targets=["0"])


def holds(scaling: Any) -> bool:
    return 1 / 1.3 < measure(scaling) < 1.3


def test_the_gradient_does_not_depend_on_the_rank() -> None:
    assert holds(stable)


def test_with_the_usual_scale_it_does() -> None:
    assert measure(lambda r: al.LoRA(r=r, targets=["0"])) > 4


def test_every_module_has_the_scale_of_its_rank(tiny: Any) -> None:
    host = al.attach(tiny("llama"), al.RsLoRA(r=4, alpha=6, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}))
    for path, layer in host.adapters("default").items():
        r, alpha = (2 if "q_proj" in path else 4), (3 if "v_proj" in path else 6)
        assert layer.scale == pytest.approx(alpha / math.sqrt(r))
        assert torch.allclose(layer.delta(), layer.scale * layer.B @ layer.A)
    shapes = {p: a.site.shape for p, a in host.adapters("default").items()}
    assert host.summary().trainable == sum((2 if "q_proj" in p else 4) * sum(s) for p, s in shapes.items())


def test_the_scale_cannot_be_turned_off() -> None:
    with pytest.raises(ConfigError, match="scale"):
        al.RsLoRA(scale="linear")


RS = al.RsLoRA
BROKEN: dict[str, Mutation] = {
    "alpha / r": (RS, "scaling", lambda self, path: self.alpha / self.rank(path)),
    "the rank forgotten": (RS, "scaling", lambda self, path: self.alpha),
    "the fourth root": (RS, "scaling", lambda self, path: self.alpha / self.rank(path) ** 0.25),
    "the rank of all modules": (RS, "scaling", lambda self, path: self.alpha / self.r**0.5),
    "the alpha of all modules": (RS, "scaling", lambda self, path: self.alpha / self.rank(path) ** 0.5),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_the_gradient_does_not_depend_on_the_rank, test_every_module_has_the_scale_of_its_rank, lines=BROKEN
)
