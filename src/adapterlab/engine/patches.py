"""Values that live in the base model's own parameters, with the originals kept so that undo is bit-exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapterlab.foreign.sharding import fill


@dataclass
class Patch:
    """A base parameter that one adapter trains in place, or some of its entries, or replaces by a frozen value.

    Attributes:
        path: the parameter's name in the model.
        original: the base value (of the entries), or None when the user gave up undo to save memory.
        index: flat row-major positions `[k]` of the entries, or None for the whole tensor.
        trained: the adapter's value while it is not written into the model.
        live: whether the adapter's value is in the model now.
        trains: whether a whole tensor takes gradients while it is live.
        derive: for a frozen value: makes it from the original. It is made anew whenever it is needed, and not saved.
    """

    path: str
    original: Tensor | None
    index: Tensor | None = None
    trained: Tensor | None = None
    live: bool = True
    trains: bool = True
    derive: Callable[[Tensor], Tensor] | None = None

    def clashes(self, other: Patch) -> bool:
        """Say whether two patches touch the same entries."""
        if self.path != other.path:
            return False
        if self.index is None or other.index is None:
            return True
        return bool(torch.isin(self.index, other.index).any())

    def value(self, model: nn.Module) -> Tensor:
        """The adapter's value, wherever it is now: the parameter itself while it is live and whole."""
        if self.live:
            parameter = model.get_parameter(self.path)
            return parameter if self.index is None else parameter.detach().view(-1)[self.index]
        return self._away()

    def _away(self) -> Tensor:
        """The adapter's value while it is not in the model."""
        if self.derive is not None:
            assert self.original is not None
            return self.derive(self.original)
        assert self.trained is not None
        return self.trained

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Derive a frozen value anew, after the tensors it is made of have changed."""
        if self.derive is not None and self.live:
            self._put(model, self._away())

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        """Put the adapter's value into the model."""
        if not self.live:
            self._put(model, self._away())
            self.trained, self.live = None, True
            if self.index is None:
                model.get_parameter(self.path).requires_grad_(self.trains)

    @torch.no_grad()
    def undo(self, model: nn.Module, keep: bool = True) -> None:
        """Put the original bits back; with `keep`, remember the adapter's value for the next `write`."""
        if self.live and self.original is not None:
            self.trained = self.value(model).detach().clone() if keep and self.derive is None else None
            self._put(model, self.original)
            self.live = False
            if self.index is None:
                parameter = model.get_parameter(self.path)
                self.trains = parameter.requires_grad
                parameter.requires_grad_(False)

    def _put(self, model: nn.Module, value: Tensor) -> None:
        parameter = model.get_parameter(self.path)
        if self.index is None:
            fill(parameter, value)
        else:
            parameter.view(-1)[self.index] = value
