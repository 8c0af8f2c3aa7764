"""Learning-rate schedules: warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Kind = Literal["cosine", "linear", "constant"]


def factor(step: int, total: int, *, kind: Kind = "cosine", warmup: int = 0, floor: float = 0.0) -> float:
    """Return what the learning rate is multiplied with.

    The warm-up rises from 1 / warmup, never from 0: a first step at rate 0 would be spent for nothing.

    Args:
        step: counted from 0.
        total: number of steps of the run.
        kind: of the part after the warm-up.
        warmup: number of steps until the full rate.
        floor: the factor that the decay ends in.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    left = 1 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2
    return floor + (1 - floor) * left


def schedule(optimizer: Optimizer, total: int, *, kind: Kind, warmup: int = 0, floor: float = 0.0) -> LambdaLR:
    """Make the schedule of an optimizer; every parameter group keeps its own base rate."""
    return LambdaLR(optimizer, lambda step: factor(step, total, kind=kind, warmup=warmup, floor=floor))
