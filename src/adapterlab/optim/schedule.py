"""Learning-rate schedules: warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Kind = Literal["cosine", "linear", "constant"]
# A part of a run: a number of steps, or a share of it.
Span = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)]


def factor(step: float, total: int, *, kind: Kind = "cosine", warmup: int = 0, floor: float = 0.0) -> float:
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


def steps_of(span: float, total: int) -> int:
    """Number of steps of a part of a run, which is given as that (an integer) or as a share of all (a float)."""
    return int(span * total) if isinstance(span, float) else span


def schedule(optimizer: Optimizer, rate: Callable[[int], float]) -> LambdaLR:
    """Make the schedule of an optimizer from a factor of each step; every parameter group keeps its own base rate."""
    return LambdaLR(optimizer, rate)
