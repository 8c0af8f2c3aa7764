"""What adapters say that they make of a linear layer (`Adapter.serving`) is what they compute, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adapterlab import registry
from adapterlab.core.adapter import Affine
from adapterlab.foreign.model import plain_class
from adapterlab.testing import Case
from adapterlab.testing.case import perturb


def by_formula(module: Any, change: Affine, x: Tensor) -> Tensor:
    """g ⊙ (W (l ⊙ x) + b + s · B A x) + c."""
    y: Tensor = plain_class(module).forward(module, x if change.on_input is None else change.on_input * x)
    if change.a is not None and change.b is not None:
        y = y + change.scale * (x @ change.a.T @ change.b.T)
    y = y if change.gain is None else change.gain * y
    return y if change.shift is None else y + change.shift


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "hra", "adalora", "lora_xs"])
def test_of_methods_with_and_without_a_form_of_their_own(name: str) -> None:
    seen = 0
    case = Case(registry.method(name))
    model = case.model().double()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is None:
            module.bias = torch.nn.Parameter(torch.randn(module.out_features, dtype=torch.float64))
    model.requires_grad_(False)
    host = case.attach("a", model=model)
    perturb(host, "a")
    model.eval()
    for path, adapter in host.adapters("a").items():
        if adapter.site.kind != "linear" or "experts" in path:
            continue
        change, module = adapter.serving(), adapter.site.module
        assert isinstance(change, Affine)
        x = torch.randn(2, 5, adapter.site.shape[1], dtype=torch.float64)
        with torch.no_grad():
            difference = (module(x) - by_formula(module, change, x)).abs().max()
            base = (module(x) - plain_class(module).forward(module, x)).abs().max()
        assert difference < 1e-10, path
        assert base > 1e-4, path
        seen += 1
    assert seen > 1
