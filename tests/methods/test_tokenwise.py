"""What adapters say that they make of each token (`Adapter.serving`) is what they compute, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adapterlab import registry
from adapterlab.core.adapter import Tokenwise
from adapterlab.foreign.model import plain_class
from adapterlab.testing import Case
from adapterlab.testing.case import perturb

GELU_TANH = torch.nn.GELU("tanh")


def by_formula(module: Any, change: Tokenwise, x: Tensor) -> Tensor:
    """g ⊙ (h + s · B f(A z + d)) + c with h = M(l ⊙ x), and z x or h."""
    h: Tensor = plain_class(module).forward(module, x if change.on_input is None else change.on_input * x)
    y, z = h, h if change.reads_output else x
    if change.a is not None and change.b is not None:
        inner = z @ change.a.T + (0 if change.d is None else change.d)
        f = {None: torch.nn.Identity(), "gelu": F.gelu, "gelu_tanh": GELU_TANH, "relu": torch.relu, "silu": F.silu}[
            change.f
        ]
        y = y + change.scale * (f(inner) @ change.b.T)
    y = y if change.gain is None else change.gain * y
    return y if change.shift is None else y + change.shift


OF_MODULES = ("lora", "dora", "ia3", "hra", "adalora", "lora_xs")
OF_BLOCKS = ("adapter_houlsby", "adapter_pfeiffer", "adapter_parallel", "compacter", "sparse_adapter", "adamix")


@pytest.mark.parametrize("name", [*OF_MODULES, *OF_BLOCKS])
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
        site = adapter.site
        if (site.kind != "linear" and name in OF_MODULES) or "experts" in path or not path:
            continue
        change, module = adapter.serving(), site.module
        assert isinstance(change, Tokenwise)
        width = site.shape[1] if site.kind == "linear" else model.config.hidden_size
        x = torch.randn(2, 5, width, dtype=torch.float64)
        with torch.no_grad():
            difference = (module(x) - by_formula(module, change, x)).abs().max()
            base = (module(x) - plain_class(module).forward(module, x)).abs().max()
        assert difference < (1e-5 if site.kind == "norm" else 1e-10), path  # norms compute in float32
        assert base > 1e-4, path
        seen += 1
    assert seen > 1
