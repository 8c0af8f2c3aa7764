"""Updates of several adapters in one pass, in a way of `ops.segmented`: without gradients, for who owns the adapters.

A server loads adapters and lets nobody write to them. So where their factors lie is written down when they are loaded;
what a step needs is put together once for all modules, when its adapters are others than those of the step before;
and nothing is checked in a call.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from adapterlab.core.segments import Segments
from adapterlab.core.state import State
from adapterlab.engine.resting import resting
from adapterlab.errors import BuildError
from adapterlab.ops.by_address import ByAddress
from adapterlab.ops.segmented import ENTRY, UNREADABLE, Entries, Run, Runs, Step, Update, Way, by_column, entry

_MAPS = 16  # that are kept prepared: of a step there are several where adapters stand around whole blocks


@functools.cache
def fastest(device: str) -> tuple[Way | None, str]:
    """Return the fastest way on a kind of device, or why there is none."""
    try:
        if device == "cpu":
            return ByAddress(), ""
        if device == "cuda" and importlib.util.find_spec("triton") is not None:
            from adapterlab.ops.by_triton import ByTriton

            return ByTriton(), ""
    except BuildError as error:
        return None, str(error)
    return None, f"there is no kernel for {device}"


class _Held(NamedTuple):
    """Where the factors of an adapter are, by the number of the module, and what keeps them there."""

    entries: Entries
    factors: list[tuple[Tensor, Tensor]]


class _Prepared(NamedTuple):
    """A step, and which modules it computes."""

    segments: Segments
    step: Step
    readable: list[bool]


class Products:
    """Computes modules with the updates of a mixed batch, while `State.products` is this.

    Attributes:
        way: how.
    """

    def __init__(self, way: Way):
        self.way = way
        self._numbers: dict[nn.Module, int] = {}
        self._widths: list[tuple[int, int]] = []
        self._held: dict[str, _Held] = {}
        self._prepared: dict[int, _Prepared] = {}

    def take(self, key: str, adapters: Iterable[Any]) -> None:
        """Lay the factors of an adapter out and write down where they are; from now on they stay there as they are.

        Args:
            key: of the adapter.
            adapters: at all of its modules.
        """
        found = [(self._number(adapter), _update(adapter)) for adapter in adapters]
        entries = np.zeros(len(self._widths), ENTRY)
        for number, update in found:
            if number is not None:
                known = (0, 0, 0, 0.0, UNREADABLE) if update is None else entry(update, *self._widths[number])
                entries[number] = known
        self._held[key] = _Held(entries, [(update.a, update.b) for _, update in found if update is not None])
        self._prepared.clear()

    def drop(self, key: str) -> None:
        """Forget an adapter."""
        self._held.pop(key, None)
        self._prepared.clear()

    def computed(self, state: State, module: Any, forward: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor | None:
        """Compute a module and what its adapters add.

        Args:
            state: shared by the adapters.
            module: the module.
            forward: its own forward.
            args: what it is called with.
            kwargs: likewise.

        Returns:
            None where it is not given all tokens of the map in one row, or an adapter there is no product of factors.
        """
        segments, number = state.segments, self._numbers.get(module)
        if segments is None or number is None or kwargs or len(args) != 1 or torch.is_grad_enabled():
            return None
        x = args[0]
        if type(x) is not Tensor or x.dtype not in self.way.dtypes or torch.compiler.is_compiling():
            return None
        if x.shape[:-1] != (1, segments.total):
            return None
        prepared = self._prepared.get(id(segments)) or self._prepare(segments)
        if not prepared.readable[number]:
            return None
        y: Tensor = forward(module, x)
        if y.dtype is not x.dtype or not y.is_contiguous():  # of packed weights, say
            return None
        prepared.step(number, x, y)
        return y

    def _prepare(self, segments: Segments) -> _Prepared:
        owned = [(who, start, stop) for who, start, stop in segments.parts if isinstance(who, tuple)]
        keys = list(dict.fromkeys(key for who, _, _ in owned for key in who))
        table = np.zeros((len(self._widths), len(keys)), ENTRY)
        for column, key in enumerate(keys):
            held = self._held.get(key)
            if held is None:
                table[:, column]["type"] = UNREADABLE
            else:
                table[: len(held.entries), column] = held.entries
        numbers = {key: number for number, key in enumerate(keys)}
        plain = segments.by_token and len(owned) == len(segments.parts)  # there is no composition
        readable = (table["type"] != UNREADABLE).all(1) & plain
        runs = [Run(start, stop, numbers[key]) for who, start, stop in owned for key in who]
        step = self.way.step(table, self._widths, Runs(runs, segments.total))
        if len(self._prepared) >= _MAPS:
            self._prepared.clear()
        made = self._prepared[id(segments)] = _Prepared(segments, step, readable.tolist())
        return made

    def _number(self, adapter: Any) -> int | None:
        """The number of an adapter's module, or None where that is no linear layer."""
        module = adapter.site.module
        if module not in self._numbers and adapter.site.kind == "linear":
            out, n_in = adapter.site.shape
            self._numbers[module] = len(self._widths)
            self._widths.append((n_in, out))
        return self._numbers.get(module)


def _update(adapter: Any) -> Update | None:
    """What an adapter adds, if it is nothing but a product of two factors at rest."""
    found = resting({"": adapter}, mixed=True)
    if found is None:
        return None
    rest = found[""]
    if not rest.b.T.is_contiguous():
        rest.b.data = by_column(rest.b.data)
    return Update(rest.a.detach(), rest.b.detach(), rest.scale)
