"""Values that live in the base model's own parameters, with the originals kept so that undo is bit-exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Patch:
    """A base parameter that one adapter trains or replaces in place.

    Attributes:
        path: the parameter's name in the model.
        original: the base value, or None when the user gave up undo to save memory.
        trained: the adapter's value while it is not written into the model.
        live: whether the adapter's value is in the model now.
    """

    path: str
    original: Tensor | None
    trained: Tensor | None = None
    live: bool = True

    def value(self, model: nn.Module) -> Tensor:
        """The adapter's value, wherever it is now."""
        if self.live:
            return model.get_parameter(self.path)
        assert self.trained is not None
        return self.trained

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        """Put the adapter's value into the model."""
        if not self.live:
            assert self.trained is not None
            model.get_parameter(self.path).copy_(self.trained)
            self.trained, self.live = None, True

    @torch.no_grad()
    def undo(self, model: nn.Module, keep: bool = True) -> None:
        """Put the original bits back; with `keep`, remember the adapter's value for the next `write`."""
        if self.live and self.original is not None:
            parameter = model.get_parameter(self.path)
            self.trained = parameter.detach().clone() if keep else None
            parameter.copy_(self.original)
            self.live = False
