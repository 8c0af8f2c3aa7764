"""Inputs in clusters, with another target in each: what a mixture can fit and one adapter cannot."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adapterlab.core.method import Method
from adapterlab.hosts import attach

CLUSTERS, WIDTH, RANK = 4, 16, 2


def updates(seed: int) -> tuple[Tensor, Tensor, nn.Sequential]:
    """Four clusters of inputs; within each the target is W x plus a rank-2 update of its own."""
    draw = torch.Generator().manual_seed(seed)
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(WIDTH, WIDTH, generator=draw) / 4)
    centres = 2 * torch.randn(CLUSTERS, WIDTH, generator=draw)
    deltas = torch.randn(CLUSTERS, WIDTH, RANK, generator=draw) @ torch.randn(CLUSTERS, RANK, WIDTH, generator=draw) / 4
    which = torch.arange(1024) % CLUSTERS
    x = centres[which] + torch.randn(1024, WIDTH, generator=draw)
    y = x @ linear.weight.detach().T + torch.einsum("ni,noi->no", x, deltas[which])
    return x, y, nn.Sequential(linear)


def fitted(
    method: Method, x: Tensor, y: Tensor, model: nn.Module, *, seed: int = 0, steps: int = 400, lr: float = 1e-2
) -> float:
    """Held-out mean squared error after training on three quarters."""
    torch.manual_seed(seed)
    host = attach(model, method)
    optimizer = torch.optim.Adam(host.parameters("default"), lr=lr)
    cut = len(x) * 3 // 4
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x[:cut]) - y[:cut]).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(x[cut:]) - y[cut:]).square().mean())
