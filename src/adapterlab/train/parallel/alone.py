"""One process: nothing is shared. The other kinds say what they do otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from adapterlab.errors import ConfigError
from adapterlab.hosts import Host

Result = TypeVar("Result")
Item = TypeVar("Item")


class Alone:
    """How a model and what trains it are spread over processes and devices; what a loop asks, in the order of asking.

    Class attributes:
        kind: the word in the configuration.

    Attributes:
        accelerator: of accelerate, which started the processes' talk.
    """

    kind = "alone"

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def __str__(self) -> str:
        return "one process"

    # ------------------------------------------------------------------ beginning

    def check(self, host: Host, name: str) -> None:
        """Refuse what cannot be trained in this way, before anything is moved.

        Raises:
            ConfigError: the method or the model cannot; the message says why.
        """

    def spread(self, host: Host, name: str) -> None:
        """Put model and adapter where they belong: after attaching, and before the optimizer is built."""

    def device(self, model: nn.Module) -> torch.device:
        """Return where batches belong."""
        return next(model.parameters()).device

    def optimizer(self, optimizer: Optimizer) -> Any:
        """Return what makes the steps of an optimizer."""
        return self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    # ------------------------------------------------------------------ a step

    def evened(self, batches: Sequence[Item], spare: Callable[[], Item]) -> list[tuple[Item, bool]]:
        """Return as many batches as every other process has in this step, and which of them count.

        Args:
            batches: of this process.
            spare: makes one that bears a label and does not count.
        """
        return [(batch, True) for batch in batches]

    def passes(self, batches: int) -> int:
        """Return how many batches every process evaluates, if this one has so many."""
        return batches

    def called(self, compute: Callable[[], Result]) -> Result:
        """Compute a loss with the model; everything that reads the model's own tensors sees them whole."""
        return compute()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the step."""
        self.accelerator.backward(loss)

    def share(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of a step over processes; the loss is divided by all their labels already."""

    def clip(self, parameters: Sequence[nn.Parameter], limit: float | None) -> float:
        """Shorten the gradients of all parameters to a norm, and return the norm they had."""
        return float(self.accelerator.clip_grad_norm_(parameters, limit or math.inf))

    # ------------------------------------------------------------------ saving

    def gathered(self, value: Item) -> list[Item]:
        """Return what processes found where each sees a part; where all see the same, what this one found."""
        return [value]

    @property
    def saves_together(self) -> bool:
        """Whether every process has to come where an adapter is written, because each has a part of it."""
        return False

    def taken_apart(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[tuple[Any, ...], Tensor]]:
        """Return a state without what is split among processes, and that, by the keys that lead to it in the state.

        In its place stand zeros that take no memory.
        """
        return dict(state), {}


def refused(kind: str, id: str, why: str, instead: str) -> ConfigError:
    """The refusal of a kind for a method."""
    return ConfigError(f"parallel={kind} cannot train {id}: {why}. {instead}.")
