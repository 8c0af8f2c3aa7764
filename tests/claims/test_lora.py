"""LoRA's claim: an update of rank r recovers a change of rank r, and no more than that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adapterlab as al

WIDTH, RANK = 24, 4


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def excess(r: int, broken: Any = None) -> float:
    """Remaining share of the initial loss against a teacher that differs by rank 4 with equal singular values."""
    torch.manual_seed(0)
    student = Regression()
    left, right = (torch.linalg.qr(torch.randn(WIDTH, RANK)).Q for _ in range(2))
    change = left @ right.T
    host = al.attach(student, al.LoRA(r=r, alpha=float(r), targets=["layer"], init="gaussian"))
    adapter: Any = host.adapters("default")["layer"]
    if broken:
        broken(adapter)
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


def claim(broken: Any = None) -> None:
    assert excess(4, broken) < 0.01
    assert 0.50 - 1e-4 <= excess(2, broken) <= 0.60  # two of four equal singular values: half is the floor


def test_the_rank_decides_what_can_be_learned() -> None:
    claim()


def freeze_one_factor(adapter: Any) -> None:
    adapter.A.requires_grad_(False)


def one_rank_short(adapter: Any) -> None:
    adapter.A.register_hook(lambda g: torch.cat([g[:-1], 0 * g[-1:]]))
    adapter.B.register_hook(lambda g: torch.cat([g[:, :-1], 0 * g[:, -1:]], 1))


def full_rank(adapter: Any) -> None:
    adapter.extra = nn.Parameter(torch.zeros(WIDTH, WIDTH))
    adapter.around = lambda run, x: run(x) + x @ adapter.extra.T


@pytest.mark.parametrize("fault", [freeze_one_factor, one_rank_short, full_rank])
def test_a_broken_implementation_does_not_pass(fault: Any) -> None:
    with pytest.raises(AssertionError):
        claim(fault)


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
