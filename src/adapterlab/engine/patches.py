"""Values that live in the base model's own parameters, with the originals kept so that undo is bit-exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapterlab.engine.sparse import Chosen
from adapterlab.foreign.sharding import fill, is_part, read, whole, write


@dataclass
class Patch:
    """A base parameter that one adapter trains in place, or some of its entries, or replaces by a frozen value.

    Attributes:
        path: the parameter's name in the model.
        original: the base value (of the entries), or None when the user gave up undo to save memory.
        chosen: which entries, and their values; None: the whole tensor.
        entire: for the time being the whole tensor in their place, until `narrow`.
        trained: the adapter's value of a whole tensor while it is not written into the model.
        live: whether the adapter's value is in the model now.
        trains: whether a whole tensor takes gradients while it is live.
        derive: for a frozen value: makes it from the original. It is made anew whenever it is needed, and not saved.
        at: the places that the original is of.
    """

    path: str
    original: Tensor | None
    chosen: Chosen | None = None
    entire: bool = False
    trained: Tensor | None = None
    live: bool = True
    trains: bool = True
    derive: Callable[[Tensor], Tensor] | None = None
    at: Tensor | None = None

    @property
    def entries(self) -> Chosen | None:
        """The entries that are owned now; None: the whole tensor."""
        return None if self.entire else self.chosen

    @property
    def index(self) -> Tensor | None:
        """Flat row-major positions `[k]` of the entries that are owned now, or None for the whole tensor."""
        return None if self.entries is None else self.entries.index()

    def clashes(self, other: Patch) -> bool:
        """Say whether two patches touch the same entries."""
        return self.path == other.path and self.touches(other.index)

    def touches(self, index: Tensor | None) -> bool:
        """Say whether any of these entries of the parameter, or of all, is among those of the patch."""
        own = self.index
        return own is None or index is None or bool(torch.isin(own, index.to(own.device)).any())

    def value(self, model: nn.Module) -> Tensor:
        """The adapter's value, wherever it is now: the parameter itself while it is live and whole."""
        if self.entries is not None:
            return self.entries.values()
        return model.get_parameter(self.path) if self.live else self._away()

    def _away(self) -> Tensor:
        """The adapter's value while it is not in the model."""
        if self.derive is not None:
            assert self.original is not None
            return self.derive(whole(self.original))
        assert self.trained is not None
        return self.trained

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Put the value into the model anew, after the tensors it is made of have changed."""
        if self.chosen is not None:
            self.chosen.renew()
        if self.entries is not None and self.live:
            self._restore(model)  # they may be others now
            self._place(model, self.entries)
        elif self.derive is not None and self.live:
            self._put(model, self._away())

    def moved(self) -> bool:
        """Say whether entries are owned that are not those whose originals are kept."""
        if self.entries is None or self.at is None:
            return False
        self.entries.renew()
        return not torch.equal(self.entries.places().to(self.at.device), self.at)

    @torch.no_grad()
    def narrow(self, model: nn.Module) -> None:
        """Give the whole tensor back and own the chosen entries from now on."""
        if self.entire:
            live = self.live
            self.undo(model, keep=False)
            self.entire = self.live = False
            if live:
                self.write(model)

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        """Put the adapter's value into the model."""
        if self.live:
            return
        if self.entries is not None:
            self._place(model, self.entries)
        else:
            self._put(model, self._away())
            model.get_parameter(self.path).requires_grad_(self.trains)
        self.trained, self.live = None, True

    @torch.no_grad()
    def undo(self, model: nn.Module, keep: bool = True) -> None:
        """Put the original bits back; with `keep`, remember the adapter's value for the next `write`."""
        if not self.live or self.original is None:
            return
        self.live = False
        if self.entries is not None:
            self._restore(model)
            return
        parameter = model.get_parameter(self.path)
        self.trained = parameter.detach().clone() if keep and self.derive is None else None
        self._put(model, self.original)
        self.trains = parameter.requires_grad
        parameter.requires_grad_(False)

    def _put(self, model: nn.Module, value: Tensor) -> None:
        fill(model.get_parameter(self.path), value)

    def _place(self, model: nn.Module, entries: Chosen) -> None:
        """Write the entries, and keep what was there: with all others switched off, that is the base's."""
        parameter = model.get_parameter(self.path)
        if is_part(parameter):
            return self._place_in_part(parameter, entries)
        places, view = entries.places().to(parameter.device), entries.seen(parameter)
        if self.original is not None:
            self.original, self.at = view[places], places.clone()
        view[places] = entries.values().to(parameter.device, parameter.dtype)

    def _place_in_part(self, parameter: nn.Parameter, entries: Chosen) -> None:
        """The same where each process has some rows of the parameter: by flat positions."""
        index = entries.index()
        if self.original is not None:
            self.original, self.at = read(parameter, index), index.clone()
        write(parameter, index, entries.values().flatten())

    def _restore(self, model: nn.Module) -> None:
        """Write the original entries."""
        if self.original is not None and self.at is not None:
            assert self.chosen is not None
            parameter = model.get_parameter(self.path)
            if is_part(parameter):
                write(parameter, self.at, self.original)
            else:
                self.chosen.seen(parameter)[self.at] = self.original
