"""Low-rank adapters that exist already, for methods that are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import adapterlab as al

Factors = dict[str, tuple[Tensor, Tensor, float]]  # A, B and the scale, by the name of the part


def put(model: Any, parts: Mapping[str, Mapping[str, Any]], seed: int = 0, size: float = 0.3) -> dict[str, str]:
    """Attach a LoRA with random factors for each part, switched off; what `adapters` is set to."""
    draw = torch.Generator().manual_seed(seed)
    for part, fields in parts.items():
        host = al.attach(model, al.LoRA(**fields), part)
        for p in host.parameters(part):
            p.data = size * torch.randn(p.shape, generator=draw, dtype=p.dtype)
        host.activate()
    return {part: part for part in parts}


def at(host: Any, path: str, parts: Sequence[str]) -> Factors:
    """What the parts have at one module; those that leave it alone are missing."""
    found = {part: host.adapters(part).get(path) for part in parts}
    return {part: (a.A.detach(), a.B.detach(), a.scale) for part, a in found.items() if a is not None}
