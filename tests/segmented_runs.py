"""Random runs of tokens with updates, and what is computed of them against the formula in float64."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from adapterlab.ops.segmented import FUNCTIONS, Run, Runs, Update, by_column, formula, product

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(seed: int, dtype: torch.dtype, factors: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
    """Random sizes, runs and factors: tokens of nobody, of one and of several, long runs and empty ones."""
    draw, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    n_in, out = draw.choice([(1, 3), (17, 40), (64, 33), (1100, 8), (96, 576)])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers)

    ranks = draw.sample([1, 2, 4, 7, 8, 16, 33, 64], 4)
    pairs = [(normal(rank, n_in) / n_in**0.5, normal(out, rank) / rank**0.5) for rank in ranks]
    pairs = [(a.to(device, factors), by_column(b.to(device, factors))) for a, b in pairs]
    inner = [(normal(rank).to(device, factors), f) for rank, f in zip(ranks, draw.sample(FUNCTIONS, 4), strict=True)]
    updates = [
        Update(a, b, draw.uniform(-2, 2), *more) for (a, b), more in zip(pairs, [(None, None), *inner[1:]], strict=True)
    ]
    runs, total = [], 0
    for length in draw.choices([0, 1, 1, 1, 3, 37], k=9):
        owners = draw.sample(range(4), draw.choice([0, 1, 1, 1, 2]))
        runs += [Run(total, total + length, number) for number in owners]
        total += length
    total = max(total, 1)
    x, y = (normal(1, total, width).to(device, dtype) for width in (n_in, out))
    return updates, Runs(runs, total), x, y


def check(way: Any, seed: int, dtype: torch.dtype, factors: torch.dtype, device: str = "cpu") -> None:
    updates, runs, x, y = drawn(seed, dtype, factors, device)
    wanted, before = y.double(), y.clone()
    formula(x[0], wanted[0], updates, runs)
    product(way, updates, runs)(x, y)
    roundings = len(runs.rounds) * (8 if dtype == torch.float32 else 1)  # sums are in float32
    assert (y.double() - wanted).abs().max() <= roundings * torch.finfo(dtype).eps * wanted.abs().max()
    owned = torch.zeros(runs.total, dtype=torch.bool)
    for run in (run for one in runs.rounds for run in one):
        owned[run.start : run.stop] = True
    assert torch.equal(y[0, ~owned], before[0, ~owned])


def with_triton(device: str) -> None:
    """Check Triton's kernels on a device, or on the CPU, where they are interpreted, which takes seconds a product."""
    from adapterlab.ops.by_triton import ByTriton

    way = ByTriton(device)  # which tries all types on something small
    for seed, dtype in enumerate(DTYPES if device == "cpu" else DTYPES * 6):
        for factors in {dtype, torch.float32}:
            check(way, seed, dtype, factors, device)
