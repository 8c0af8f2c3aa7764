"""Many low-rank adapters in one batch without a loop over them: slots and a row map.

Every module that any of the adapters touches gets stacked factors A `[slots, r, in]` and Bᵀ `[slots, r, out]`, padded
with zeros to the largest rank, and a tensor says for each row of the batch which slot is its own. Shapes do not depend
on who is in the batch, so a compiled model keeps one graph for every mix; switching by name costs a graph for each set
of names, up to the compiler's limit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterlab.core.adapter import Delta
from adapterlab.core.segments import Segments, segments
from adapterlab.core.site import Site
from adapterlab.engine.batch_rows import followed, given
from adapterlab.engine.resting import Padded
from adapterlab.engine.wrapping import put, take
from adapterlab.errors import AttachError, nearest
from adapterlab.ops.low_rank import FEW_OF_A_ROW, add_low_rank_by_row, low_rank_by_row, thin_dtype

if TYPE_CHECKING:
    from adapterlab.core.state import State
    from adapterlab.engine.attachments import Attachments

_KEY = "_slots"


class Slots(Delta):
    """The stacked factors of one module; slot 0 is the plain base."""

    not_linear: ClassVar[str] = "each row of a batch has its own update"

    A: Tensor
    B: Tensor  # transposed
    row_A: Tensor
    row_B: Tensor

    def __init__(self, site: Site, parts: Sequence[tuple[Tensor, Tensor] | None], rows: Tensor, state: State):
        super().__init__(site)
        padded = Padded([None, *parts])
        self.register_buffer("A", padded.a, persistent=False)
        self.register_buffer("B", padded.b, persistent=False)
        self.state = state
        self.choose(rows)

    def choose(self, rows: Tensor) -> None:
        """Give each row of the next batches its slot `[rows]`."""
        self.rows = rows
        self.segments = _alike(len(rows))
        self.register_buffer("row_A", self.A[rows], persistent=False)
        self.register_buffer("row_B", self.B[rows], persistent=False)

    def whole(self, x: Tensor) -> Tensor | None:
        """The base's product and both of the update in place, outside of training and of compiled graphs."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        given(self.site.path, x, self.state, self.segments)
        n, dtype = len(self.rows), thin_dtype(x, FEW_OF_A_ROW, len(self.rows))
        y = F.linear(x, self.site.frozen_weight(x.dtype)[0], self.site.bias)
        add_low_rank_by_row(
            y.view(n, -1, y.shape[-1]), x.reshape(n, -1, x.shape[-1]), self.row_A.to(dtype), self.row_B.to(dtype)
        )
        return y

    def added(self, x: Tensor) -> Tensor:
        """(x Aᵀ) B with each row's own factors, in the dtype of x: `[batch, ..., out]`."""
        given(self.site.path, x, self.state, self.segments)
        rows = x.reshape(len(self.rows), -1, x.shape[-1])  # beams and flattened tokens are runs of each row
        return low_rank_by_row(rows, self.row_A, self.row_B).view(*x.shape[:-1], -1)


class Stack:
    """Handle on stacked adapters; `rows` says who is in the next batch."""

    def __init__(self, names: Sequence[str], slots: Sequence[Slots], device: torch.device):
        self.names, self.slots, self.device = tuple(names), slots, device

    def rows(self, names: Sequence[str | None]) -> None:
        """Give each row of the next batches its adapter; None is the plain base.

        Raises:
            AttachError: a name is not in the stack.
        """
        for name in names:
            if name is not None and name not in self.names:
                raise AttachError(f"{name!r} is not in this stack. {nearest(name, self.names)}")
        index = [0 if name is None else self.names.index(name) + 1 for name in names]
        rows = torch.tensor(index, device=self.device)
        for slot in self.slots:
            slot.choose(rows)


@contextlib.contextmanager
def stacked(host: Attachments, names: Sequence[str]) -> Iterator[Stack]:
    """Put stacked factors on the model in place of the adapters; see `Host.stack`."""
    paths = {path: None for name in names for path in host.adapters(name)}
    extra = [n for n in names if len(host.parts(n)) > 1 or host.patches[n] or host.shared(n)]
    if extra:
        raise AttachError(f"{extra[0]!r} ({host.methods[extra[0]].id}) is more than low-rank updates. {_NEXT}")
    plan: list[tuple[Site, list[tuple[Tensor, Tensor] | None]]] = []
    for path in paths:
        here = [host.adapters(name).get(path) for name in names]
        plan.append((next(a.site for a in here if a is not None), [_factored(a, path) for a in here]))
    before, device = host.live, next(host.model.parameters()).device
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    slots = [Slots(site, parts, rows, host.state) for site, parts in plan]
    host.activate()
    try:
        for slot in slots:
            put(slot.site.module, _KEY, slot.eval(), host.state)
        host.state.active = (_KEY,)
        with followed(host.model, paths, host.state, lambda: slots[0].segments):
            yield Stack(names, slots, device)
    finally:
        for slot in slots:
            take(slot.site.module, _KEY)
        host.activate(*before)


def _alike(rows: int) -> Segments:
    """The map of rows that all go through the slots."""
    return segments([((_KEY,), rows)])


_NEXT = "Use host.rows, which mixes any row-wise adapters."


def _factored(adapter: Any, path: str) -> tuple[Tensor, Tensor] | None:
    if adapter is None:
        return None
    found = adapter.low_rank() if isinstance(adapter, Delta) else None
    if found is None:
        raise AttachError(f"The {type(adapter).__qualname__} at {path} is not a plain low-rank update. {_NEXT}")
    return found  # type: ignore[no-any-return]
