"""AdamW with masters, and schedules, against formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from adapterlab.optim import adamw, factor, master, schedule


def _steps(optimizer: torch.optim.Optimizer, p: nn.Parameter, gradients: list[torch.Tensor]) -> None:
    for gradient in gradients:
        p.grad = gradient.to(p.dtype)
        optimizer.step()


def test_half_precision_parameters_follow_float32_adamw() -> None:
    torch.manual_seed(0)
    start = torch.randn(64).bfloat16()
    gradients = [torch.randn(64).bfloat16() for _ in range(200)]
    half, full, plain = (nn.Parameter(start.clone().to(d)) for d in (torch.bfloat16, torch.float32, torch.bfloat16))
    ours = adamw([half], lr=1e-5, weight_decay=0.1)
    _steps(ours, half, gradients)
    _steps(torch.optim.AdamW([full], lr=1e-5, weight_decay=0.1), full, gradients)
    _steps(torch.optim.AdamW([plain], lr=1e-5, weight_decay=0.1), plain, gradients)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(master(ours, half), full.data, rtol=1e-6, atol=1e-7)
    assert torch.equal(half.data, master(ours, half).bfloat16())
    # The reason for masters: without them nearly every update is lost in rounding.
    moved = (full.data - start.float()).abs().mean()
    assert (plain.data.float() - start.float()).abs().mean() < 0.5 * moved


def test_float32_parameters_have_no_master_and_equal_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.arange(8.0)) for _ in range(2))
    optimizer = adamw([ours], lr=0.1, betas=(0.8, 0.9), eps=1e-6)
    gradients = [torch.randn(8) for _ in range(5)]
    _steps(optimizer, ours, gradients)
    _steps(torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0), theirs, gradients)
    torch.testing.assert_close(ours.data, theirs.data)
    assert master(optimizer, ours) is ours.data or master(optimizer, ours).data_ptr() == ours.data_ptr()


def test_the_state_of_masters_survives_saving_to_the_bit() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(32).bfloat16())
    gradients = [torch.randn(32).bfloat16() for _ in range(6)]
    optimizer = adamw([p], lr=1e-4)
    _steps(optimizer, p, gradients[:3])
    twin = nn.Parameter(p.data.clone())
    restored = adamw([twin], lr=1e-4)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin.dtype == torch.bfloat16
    assert torch.equal(twin.data, p.data)
    _steps(optimizer, p, gradients[3:])
    _steps(restored, twin, gradients[3:])
    assert torch.equal(master(restored, twin), master(optimizer, p))
    assert torch.equal(twin.data, p.data)


def test_groups_and_their_factors() -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = adamw([{"params": [a]}, {"params": [b], "lr_factor": 0.5}, {"params": [c], "lr": 3.0}], lr=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1, 3.0]
    plan = schedule(optimizer, lambda step: factor(step, 10, kind="linear", warmup=2))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.05, 1.5])
    for _ in range(6):
        optimizer.step()
        plan.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.05, 1.5])


def test_parameters_without_gradient_stay() -> None:
    half, other = nn.Parameter(torch.ones(3).bfloat16()), nn.Parameter(torch.ones(3).bfloat16())
    optimizer = adamw([half, other], lr=0.1, weight_decay=0.5)
    half.grad = torch.ones(3).bfloat16()
    optimizer.step()
    assert torch.equal(other.data, torch.ones(3).bfloat16())
    assert other.grad is None
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_schedules_by_hand() -> None:
    assert [factor(s, 10, kind="constant", warmup=4) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [factor(s, 6, kind="linear", warmup=2) for s in range(6)] == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert factor(5, 9, kind="cosine", warmup=1, floor=0.2) == pytest.approx(0.2 + 0.8 * 0.5)
    assert factor(3, 9, kind="cosine", warmup=1) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert factor(9, 9, kind="cosine", floor=0.2) == pytest.approx(0.2)
    assert factor(0, 1, kind="cosine") == 1
    for kind in ("constant", "linear", "cosine"):
        assert factor(0, 100, kind=kind, warmup=10) == 0.1, "the first step must not be spent at rate zero"
