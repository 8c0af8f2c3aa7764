"""Runs of two phases: parameters train whole, then the part of them that is chosen by how the first moved them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import MakeOptimizer, Method
from adapterlab.engine.sparse import Lines, Vector
from adapterlab.errors import ConfigError, NotTrainingError

if TYPE_CHECKING:
    from torch.optim import Optimizer


class TwoPhases(Method):
    """The parameters of `whole` train until `first`; then `choose` says what of them trains to the end.

    What is to be chosen has its place from the beginning, so that optimizers, trainers and processes see the same
    tensors all the time. Which phase it is follows from the tensors: an adapter that has been chosen for stays so, in a
    run that goes on and in another one.
    """

    def first(self, steps: int) -> int:
        """Number of steps of the first phase."""
        raise NotImplementedError

    def whole(self, host: Carrier) -> dict[str, nn.Parameter]:
        """Return what trains in the first phase, by path."""
        raise NotImplementedError

    def held(self, host: Carrier, name: str) -> Sequence[Vector | Lines]:
        """Return what keeps the chosen values."""
        raise NotImplementedError

    def choose(self, host: Carrier, name: str, optimizer: Optimizer) -> None:
        """Choose by what the first phase did, and say from which values the second begins.

        The optimizer is that of the first phase, which knows parameters in half precision more exactly.
        """
        raise NotImplementedError

    def keeps_whole(self) -> bool:
        """Say whether the whole parameters keep what the first phase made of them."""
        return False

    def unsplit(self, host: Carrier, name: str) -> str:
        """What is chosen is chosen among whole tensors."""
        return "it chooses what trains on by how far entries of whole tensors have moved in the first phase"

    # ------------------------------------------------------------------ the run

    def begin(self, host: Carrier, name: str, steps: int) -> None:
        """Fit both phases into the run.

        Raises:
            ConfigError: one of them has no step.
        """
        super().begin(host, name, steps)
        if not self.is_chosen(host, name) and not 0 < self.first(steps) < steps:
            raise ConfigError(
                f"{self.id}: of this run's {steps} steps {min(self.first(steps), steps)} are in the first phase and "
                f"{max(steps - self.first(steps), 0)} in the second, and each needs one. Train longer, or choose "
                f"another share (now {self.span()})."
            )
        for held in self.held(host, name):
            held.steps = steps

    def span(self) -> str:
        """The setting that says how long the first phase is, for messages."""
        raise NotImplementedError

    def is_chosen(self, host: Carrier, name: str) -> bool:
        """Say whether the second phase has begun."""
        return all(held.chosen for held in self.held(host, name))

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """One over what trains in either phase, in the same order whichever it is."""
        phases = [*(p for held in self.held(host, name) for p in held.parameters()), *self.whole(host).values()]
        known = {id(p) for p in phases}
        return make([*(p for p in host.parameters(name) if id(p) not in known), *phases])

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Begin the second phase when it is time.

        Raises:
            NotTrainingError: it is not known how long the run is.
        """
        super().before_step(host, name, step, optimizer)
        steps = next((held.steps for held in self.held(host, name)), None)
        if steps is None:
            raise NotTrainingError(
                f"The {self.id} adapter {name!r} does not know how many steps the run has. Call "
                f"host.methods[{name!r}].begin(host, {name!r}, steps) before the first one; adapterlab's loop and "
                "AdapterlabCallback do it by themselves."
            )
        begun = self.is_chosen(host, name)
        if not begun:
            if step < self.first(steps):
                return
            self.choose(host, name, optimizer)
            self.forget(optimizer)
        if self.is_whole(host, name):  # also in a run that goes on, on a model that was attached to anew
            self.turn(host, name)

    def forget(self, optimizer: Optimizer) -> None:
        """Let the optimizer begin anew."""
        optimizer.state.clear()

    def is_whole(self, host: Carrier, name: str) -> bool:
        """Say whether the parameters still train whole."""
        patches = host.patches[name].items()
        return any(patch.entire and host.model.get_parameter(path).requires_grad for path, patch in patches)

    def turn(self, host: Carrier, name: str) -> None:
        """Let the chosen part train and nothing else."""
        for p in self.whole(host).values():
            p.requires_grad_(False)
            p.grad = None  # a gradient of zeros would still let momentum and weight decay act
        for held in self.held(host, name):
            for p in held.parameters():
                p.requires_grad_(True)
        if not self.keeps_whole():
            host.narrow(name)
