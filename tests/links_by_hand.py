"""Low-rank links one after another as the papers write them, with plain tensors, and a task of full rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import adapterlab as al

WIDTH, R, STEPS, LR, ALPHA = 16, 2, 60, 0.02, 3.0
SCALE = ALPHA / R
Moments = dict[str, Tensor]


def task() -> tuple[Any, Tensor, Tensor]:
    """A linear map, inputs, and what it should say."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    x = torch.randn(128, WIDTH)
    return model, x, x @ (model[0].weight.detach() + 0.3 * torch.randn(WIDTH, WIDTH)).T


def plain(step: float) -> float:
    """The trainer's own schedule: a warm-up of five steps, then a cosine."""
    return (step + 1) / 5 if step < 5 else (1 + math.cos(math.pi * (step - 5) / (STEPS - 5))) / 2


def ours(method: Any, steps: int = STEPS, until: int | None = None) -> tuple[Any, list[float], Tensor]:
    """Train with the method's events, perhaps not to the end: the host, the loss of each step, and A at the start."""
    model, x, target = task()
    host = al.attach(model, method)
    found = host.methods["default"]
    a = host.tensors("default")["adapter.0.A"].detach().clone()
    found.begin(host, "default", steps)
    optimizer, losses = torch.optim.Adam(host.parameters("default"), lr=LR), []
    for step in range(until or steps):
        found.before_step(host, "default", step, optimizer)
        optimizer.param_groups[0]["lr"] = LR * found.rate(step, steps, lambda at: plain(at * STEPS / steps))
        optimizer.zero_grad()
        loss = (model(x) - target).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return host, losses, a


def drawn(seed: int, link: int) -> Tensor:
    """A at the start of a link."""
    a = torch.empty(R, WIDTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence([seed, link]).generate_state(1)[0]))
        return nn.init.kaiming_uniform_(a, a=math.sqrt(5))


def nothing_left(moments: Moments) -> None:
    """A new optimizer."""
    for value in moments.values():
        value.zero_()


def written(
    a: Tensor,
    starts: list[int],
    rate: Callable[[int], float],
    *,
    forget: Callable[[Moments], None] = nothing_left,
    kept: float = 0.0,
    warm: int = 0,
) -> Tensor:
    """Return the weight at the end. Adam is written out; full training comes first for `warm` steps."""
    model, x, target = task()
    w, a, b = model[0].weight.detach().clone(), a.clone(), torch.zeros(WIDTH, R)
    state = {key: _fresh(value) for key, value in (("a", a), ("b", b), ("w", w))}
    for step in range(STEPS):
        if step in starts and step > warm:
            w += (1 - kept) * SCALE * b @ a
            b *= kept
            if not kept:
                a, b = drawn(0, starts.index(step)), torch.zeros(WIDTH, R)
            forget(state["a"])
            forget(state["b"])
        tensors = {"w": w} if step < warm else {"a": a, "b": b}
        for value in tensors.values():
            value.requires_grad_(True)
        (x @ (w + SCALE * b @ a).T - target).square().sum(1).mean().backward()
        for key, value in tensors.items():
            value.requires_grad_(False)
            _adam(value, state[key], LR * rate(step))
            value.grad = None
    return w + SCALE * b @ a


def _fresh(value: Tensor) -> Moments:
    return {"mean": torch.zeros_like(value), "square": torch.zeros_like(value), "count": torch.zeros(())}


def _adam(p: Tensor, state: Moments, lr: float) -> None:
    g = p.grad
    assert g is not None
    state["count"] += 1
    state["mean"].mul_(0.9).add_(0.1 * g)
    state["square"].mul_(0.999).add_(0.001 * g * g)
    t = float(state["count"])
    p -= lr * state["mean"] / (1 - 0.9**t) / ((state["square"] / (1 - 0.999**t)).sqrt() + 1e-8)


def weight(host: Any) -> Tensor:
    """What the host computes with, merged."""
    host.merge("default")
    found: Tensor = host.model[0].weight.detach().clone()
    host.restore("default")
    return found


def rank(change: Tensor) -> int:
    """The number of singular values above rounding."""
    values = torch.linalg.svdvals(change.double())
    return int((values > 1e-4 * values[0]).sum())


def with_right(target: Any, name: str, wrong: Any) -> Any:
    """Return a mutation, for `monkeypatch`, that gives `wrong` the right function first."""
    right = getattr(target, name)
    return lambda m: m.setattr(target, name, lambda *args, **kwargs: wrong(right, *args, **kwargs))
