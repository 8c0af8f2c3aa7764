"""The one mutable object that all adapters of a model share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adapterlab.core.composition import Composition


@dataclass
class State:
    """What wrapped modules consult on every call. Plain attributes: Dynamo guards them cheaply.

    Attributes:
        active: keys of the live adapters, parts of composites included.
        together: how they are put together, by keys; None: they nest in order of attachment.
        rows: of a mixed batch, what each row goes through, keys or a composition of them; or None.
        losses: sink for auxiliary losses while someone collects them, else None.
        taps: tensors that one adapter leaves for another during a forward pass.
        carrier: what the adapters were attached with, to be found from a wrapped module.
        batches: while a mixed batch is computed, what each of the modules around the current one was given.
    """

    active: tuple[str, ...] = ()
    together: Composition | None = None
    rows: tuple[tuple[str, ...] | Composition, ...] | None = None
    losses: list[Tensor] | None = None
    taps: dict[str, Any] = field(default_factory=dict)
    carrier: Any = field(default=None, repr=False, compare=False)
    batches: list[Any] = field(default_factory=list)

    def emit(self, loss: Tensor) -> None:
        """Add an auxiliary loss to the forward pass; dropped when nobody collects."""
        if self.losses is not None:
            self.losses.append(loss)

    @contextlib.contextmanager
    def collect(self) -> Iterator[list[Tensor]]:
        """Collect what `emit` receives inside the context."""
        before, self.losses = self.losses, []
        try:
            yield self.losses
        finally:
            self.losses = before

    @contextlib.contextmanager
    def showing(self, rows: Sequence[tuple[str, ...] | Composition], batch: Any) -> Iterator[None]:
        """Take the batch to have other rows inside the context."""
        before, self.rows = self.rows, tuple(rows)
        self.batches.append(batch)
        try:
            yield
        finally:
            self.rows = before
            self.batches.pop()

    def snapshot(self) -> dict[str, Any]:
        """Record what a later recomputation of the same forward pass must see."""
        return {"active": self.active, "together": self.together, "rows": self.rows, "taps": dict(self.taps)}

    @contextlib.contextmanager
    def replay(self, snapshot: dict[str, Any]) -> Iterator[None]:
        """Show a recorded state again; auxiliary losses are dropped, since the first pass emitted them."""
        now = {**self.snapshot(), "losses": self.losses}
        self.__dict__.update(snapshot, losses=None)
        try:
            yield
        finally:
            self.__dict__.update(now)
