"""Updates of several adapters in one pass, in a way of `ops.segmented`: without gradients, for who owns the adapters.

A server loads adapters and lets nobody write to them. So the factors of one are copied into a block of memory, and
where each lies is written down; what a step needs is put together once for all modules, when its adapters are others
than those of the step before. The model knows nothing of such an adapter but its key, in the map of a mixed batch.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from adapterlab.core.segments import Segment, Segments
from adapterlab.core.state import State
from adapterlab.errors import AttachError, BuildError
from adapterlab.foreign.model import ADAPTERS
from adapterlab.ops.by_address import ByAddress
from adapterlab.ops.low_rank import add_low_rank, thin_dtype
from adapterlab.ops.segmented import ENTRY, TYPES, Entries, Run, Runs, Step, Update, Way, can_be_read

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
    """The factors of an adapter, and where they are by the number of the module."""

    block: Tensor
    entries: Entries

    def update(self, number: int, n_in: int, out: int) -> Update:
        """What it adds to a module of a size, at which it is."""
        _, _, rank, scale, _ = self.entries[number].tolist()
        a, b = (self._piece(number, name, rank * width) for name, width in (("a", n_in), ("b", out)))
        return Update(a.view(rank, n_in), b.view(rank, out).T, scale)

    def _piece(self, number: int, name: str, length: int) -> Tensor:
        start = (int(self.entries[name][number]) - self.block.data_ptr()) // self.block.element_size()
        return self.block[start : start + length]


class _Prepared(NamedTuple):
    """What a step adds.

    Attributes:
        segments: the map it was made for.
        step: the products of its short runs.
        long: its long runs, and whose they are.
        adds: the modules at which it adds something.
        bare: by module, whether nothing else is computed there; None: nobody has looked.
    """

    segments: Segments
    step: Step
    long: list[tuple[int, int, _Held]]
    adds: set[int]
    bare: list[bool | None]


class Products:
    """What adapters add to linear modules in a mixed batch, while `State.products` is this.

    Attributes:
        way: how it is computed.
    """

    def __init__(self, way: Way):
        self.way = way
        self._numbers: dict[nn.Module, int] = {}
        self._widths: list[tuple[int, int]] = []
        self._held: dict[str, _Held] = {}
        self._prepared: dict[int, _Prepared] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def number(self, module: nn.Module, n_in: int, out: int) -> int:
        """Return the number of a linear module of `[out, in]`; the module has to ask this, see `computed`."""
        if module not in self._numbers:
            self._numbers[module] = len(self._widths)
            self._widths.append((n_in, out))
        return self._numbers[module]

    def takes(self, number: int, update: Update) -> bool:
        """Say whether an update is of a module's size and kernels can read it."""
        return can_be_read(update, *self._widths[number])

    @torch.no_grad()
    def take(self, key: str, updates: Mapping[int, Update]) -> int:
        """Copy the factors of an adapter, which are its own from now on.

        Args:
            key: of the adapter.
            updates: by the number of the module. Of one device; of one dtype, or they are kept in float32.

        Returns:
            The bytes that they take.

        Raises:
            ValueError: factors that are not of the module's size, or that no kernel can read.
        """
        if not updates or not all(self.takes(number, update) for number, update in updates.items()):
            raise ValueError(f"the factors of {key} are not of the sizes of their modules, or no kernel can read them")
        numbers, pairs = np.array(list(updates)), list(updates.values())
        dtypes = {t.dtype for one in pairs for t in (one.a, one.b)}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        size = sum(one.a.numel() + one.b.numel() for one in pairs)
        block, start = torch.empty(size, dtype=dtype, device=pairs[0].a.device), 0
        entries = np.zeros(len(self._widths), ENTRY)
        for name, factors in (("a", [one.a for one in pairs]), ("b", [one.b.T for one in pairs])):
            for which in _alike(factors):
                shape = factors[which[0]].shape
                piece = block[start : start + len(which) * shape.numel()].view(len(which), *shape)
                torch.stack([factors[i].to(dtype) for i in which], out=piece)  # one by one takes several times as long
                offsets = np.arange(len(which), dtype=np.uint64) * np.uint64(piece[0].nbytes)
                entries[name][numbers[which]] = np.uint64(piece.data_ptr()) + offsets
                start += piece.numel()
        entries["rank"][numbers] = [len(one.a) for one in pairs]
        entries["scale"][numbers] = [one.scale for one in pairs]
        entries["type"][numbers] = TYPES[dtype]
        self._held[key] = _Held(block, entries)
        self._prepared.clear()
        return block.numel() * block.element_size()

    def drop(self, key: str) -> None:
        """Forget an adapter."""
        self._held.pop(key, None)
        self._prepared.clear()

    def computed(self, state: State, module: Any, args: Any, kwargs: Any, plain: Any, usual: Callable[..., Any]) -> Any:
        """Compute a module and what is added to it.

        Args:
            state: shared by the adapters.
            module: the module.
            args: what it is called with.
            kwargs: likewise.
            plain: its own forward.
            usual: the same with the adapters that stand around it, of the module, the state, `args` and `kwargs`.

        Raises:
            AttachError: something is to be added and it is not given all tokens of the map in one row, or a gradient
                is wanted.
        """
        number, segments = self._numbers.get(module), state.segments
        if number is None or segments is None:
            return usual(module, state, args, kwargs)
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        one_row = x is not None and x.dim() == 3 and len(x) == 1
        if one_row and not segments.by_token:  # it was found to be of one owner
            segments = segments.once(("tokens", x.shape[1]), functools.partial(segments.tokens, 1, x.shape[1]))
        if not one_row or x.shape[1] != segments.total or torch.is_grad_enabled():
            raise AttachError(
                f"What is added here is kept apart from the model, for {segments.total} tokens in one row and without "
                f"a gradient; received {'other arguments' if x is None else list(x.shape)}."
            )
        prepared = self._prepared.get(id(segments)) or self._prepare(segments)
        bare = prepared.bare[number]
        if bare is None:
            names = tuple(module._modules[ADAPTERS]._modules)
            bare = prepared.bare[number] = not segments.among(names).used
        y = plain(module, x) if bare else usual(module, state, args, kwargs)
        if number in prepared.adds:
            y = y.contiguous()
            prepared.step(number, x, y)
            for start, stop, held in prepared.long:
                if number < len(held.entries) and held.entries["rank"][number]:
                    _add(y[0, start:stop], x[0, start:stop], held.update(number, *self._widths[number]))
        return y

    def _prepare(self, segments: Segments) -> _Prepared:
        whose = [
            (key, part) for part in segments.parts if isinstance(part.who, tuple) for key in part.who if key in self
        ]
        short = [(key, part) for key, part in whose if _length(part) < self.way.long]
        long = [(part.start, part.stop, self._held[key]) for key, part in whose if _length(part) >= self.way.long]
        columns = {key: column for column, key in enumerate(dict.fromkeys(key for key, _ in short))}
        table = np.zeros((len(self._widths), len(columns)), ENTRY)
        for key, column in columns.items():
            entries = self._held[key].entries
            table[: len(entries), column] = entries
        runs = Runs([Run(part.start, part.stop, columns[key]) for key, part in short], segments.total)
        adds: set[int] = {*np.flatnonzero((table["rank"] > 0).any(1)).tolist()}
        for _, _, held in long:
            adds |= {*np.flatnonzero(held.entries["rank"]).tolist()}
        if len(self._prepared) >= _MAPS:
            self._prepared.clear()
        step = self.way.step(table, self._widths, runs)
        made = _Prepared(segments, step, long, adds, [None] * len(self._widths))
        self._prepared[id(segments)] = made
        return made


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of tensors, by their shapes."""
    found: dict[torch.Size, list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault(tensor.shape, []).append(i)
    return list(found.values())


def _length(part: Segment) -> int:
    return part.stop - part.start


def _add(y: Tensor, x: Tensor, update: Update) -> None:
    dtype = thin_dtype(x)
    add_low_rank(y, x, update.a.to(dtype).T, update.b.to(dtype).T, update.scale)
