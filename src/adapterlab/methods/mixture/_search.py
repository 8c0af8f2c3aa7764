"""A search without gradients in the form of an optimizer: a training loop runs it, saves it and continues it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WORST = 1e30  # the value of a candidate under which the loss is no number


class Search(torch.optim.Optimizer):
    """A (1+1) evolution strategy in a box: each step tries one candidate near the best one so far.

    The first candidate is 0, the second the start if it is another point. Then a candidate is best + σ · N(0, 1) in
    every coordinate, brought back into the box; σ is doubled when it is better and multiplied by 2^(−1/4) when it is
    not, which keeps it where one candidate of five is better. What is drawn depends on the seed and the step alone.

    A step is: `ask`, evaluate with `hear` (any number of times, the values add up), `judge`, `step`, `rest`.

    Attributes:
        point: the candidate, `[N]`; in `grad` the value goes from process to process.
        apply: makes a candidate what the model computes with.
        value: of the candidate.
    """

    def __init__(self, start: Tensor, apply: Callable[[Tensor], None], *, bound: float, sigma: float):
        self.point, self.apply, self.bound = nn.Parameter(start.clone()), apply, bound
        self.value = math.inf
        super().__init__([self.point], {"lr": 0.0, "seed": torch.initial_seed()})
        self.state[self.point] = {
            "start": start.clone(), "best": torch.zeros_like(start), "value": math.inf, "sigma": sigma, "count": 0,
            "first": math.inf, "heard": math.inf, "moved": False,
        }  # fmt: skip

    @property
    def held(self) -> dict[str, Any]:
        """What the search remembers: the best point and its value, the first one, σ, the number of candidates."""
        return self.state[self.point]

    @torch.no_grad()
    def ask(self) -> None:
        """Make the next candidate and apply it."""
        self.point.copy_(self.candidate(self.held["count"]))
        self.point.grad = torch.zeros_like(self.point)
        self.apply(self.point.detach())

    def candidate(self, count: int) -> Tensor:
        """The candidate of a step, counted from 0."""
        best: Tensor = self.held["best"]
        if count < self.given:
            return torch.zeros_like(best) if count == 0 else self.held["start"]
        return (best + self.held["sigma"] * self.drawn(count, best)).clamp(-self.bound, self.bound)

    @property
    def given(self) -> int:
        """How many candidates are not drawn."""
        return 2 if bool(self.held["start"].any()) else 1

    def drawn(self, count: int, like: Tensor) -> Tensor:
        """Normal numbers of a step."""
        seed = (self.param_groups[0]["seed"] * 1_000_003 + count) % 2**63
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)

    def hear(self, value: float) -> None:
        """Add to the value of the candidate."""
        assert self.point.grad is not None
        self.point.grad[0] += value if math.isfinite(value) else WORST

    def judge(self, extra: float = 0.0) -> None:
        """Take what was heard, which is complete now, and what the candidate costs beside it.

        Nothing is left that could be taken for a gradient.
        """
        assert self.point.grad is not None
        held, heard = self.held, float(self.point.grad[0])
        self.value = heard + extra
        if held["count"] == 0:
            held["heard"], held["first"] = heard, self.value
        held["moved"] = held["moved"] or heard != held["heard"]
        self.point.grad.zero_()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep the candidate if it is the best so far, and adapt σ."""
        held, better = self.held, self.value < self.held["value"]
        if held["count"] >= self.given:
            held["sigma"] *= self.widened(better)
        held["count"] += 1
        if better:
            held["value"], held["best"] = self.value, self.point.detach().clone()

    @staticmethod
    def widened(better: bool) -> float:
        """The factor of σ after a candidate."""
        return 2.0 if better else 2.0**-0.25

    @torch.no_grad()
    def rest(self) -> Tensor:
        """Apply the best point so far, and return it."""
        best: Tensor = self.held["best"]
        if not torch.equal(self.point, best):
            self.point.copy_(best)
            self.apply(best)
        return best
