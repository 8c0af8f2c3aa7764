"""Updates of several adapters in one pass, in a way of `ops.segmented`: without gradients, for who owns the adapters.

A server loads adapters and lets nobody write to them. So the factors of one are copied into a block of memory, and
where each lies is written down; what a step needs is put together once for all modules, when its adapters are others
than those of the step before. The model knows nothing of such an adapter but its key, in the map of a mixed batch.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from adapterlab.core.adapter import Tokenwise
from adapterlab.core.segments import Segment, Segments
from adapterlab.core.state import State
from adapterlab.errors import AttachError, BuildError
from adapterlab.foreign.model import ADAPTERS
from adapterlab.ops.by_address import ByAddress
from adapterlab.ops.low_rank import add_low_rank, thin_dtype
from adapterlab.ops.segmented import ENTRY, FUNCTIONS, TYPES, Entries, Run, Runs, Step, Update, Way, can_be_read

Vectors = tuple[Tensor | None, Tensor | None, Tensor | None]
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
    """What an adapter brings.

    Attributes:
        block: its factors.
        entries: where they are, by the number of the module.
        vectors: l, g and c of `Tokenwise` in float32, by the number of a module that has one of them.
    """

    block: Tensor
    entries: Entries
    vectors: dict[int, Vectors]

    def update(self, number: int, n_in: int, out: int) -> Update:
        """What it adds to a module of a size, at which it is."""
        _, _, at_d, rank, scale, _, f, reads_output = self.entries[number].tolist()
        a, b = self._piece(number, "a", rank, out if reads_output else n_in), self._piece(number, "b", rank, out)
        d = self._piece(number, "d", rank, 1)[:, 0] if at_d else None
        return Update(a, b.T, scale, d, FUNCTIONS[f])

    def _piece(self, number: int, name: str, rank: int, width: int) -> Tensor:
        start = (int(self.entries[name][number]) - self.block.data_ptr()) // self.block.element_size()
        return self.block[start : start + rank * width].view(rank, width)


class _Stacked:
    """l − 1, g − 1 and c of the adapters that have some, stacked by module: a small change survives in half precision.

    Attributes:
        rows: the row of each adapter; that of nobody, zeros, is the first.
        device: where they are.
    """

    def __init__(self, held: Mapping[str, _Held]):
        changing = {key: one.vectors for key, one in held.items() if one.vectors}
        self.rows = {key: row for row, key in enumerate(changing, 1)}
        self._vectors = [*changing.values()]
        of_all = (v for vectors in self._vectors for each in vectors.values() for v in each if v is not None)
        self.device = next((v.device for v in of_all), None)
        self._made: dict[tuple[int, torch.dtype], Vectors | None] = {}

    def at(self, number: int, x: Tensor) -> Vectors | None:
        """The stacks `[rows, in or out]` of the module of a number, for what is like x; None: nobody changes it."""
        if (number, x.dtype) not in self._made:
            each = zip(*(vectors.get(number, (None, None, None)) for vectors in self._vectors), strict=True)
            on_input, gain, shift = (_in_rows(one, neutral, x) for one, neutral in zip(each, (1, 1, 0), strict=True))
            nobody = on_input is gain is shift is None
            self._made[number, x.dtype] = None if nobody else (on_input, gain, shift)
        return self._made[number, x.dtype]


class _Added(NamedTuple):
    """What short runs add, of what modules are given, or of what they return.

    Attributes:
        step: computes it.
        modules: at which there is something.
        reads_output: see `Tokenwise`.
    """

    step: Step
    modules: set[int]
    reads_output: bool


class _Prepared(NamedTuple):
    """What a step adds.

    Attributes:
        segments: the map it was made for.
        steps: the products of its short runs: of what modules are given, and of what they return.
        long: its long runs, and whose they are.
        adds: the modules at which it adds something.
        bare: by module, whether nothing else is computed there; None: nobody has looked.
        owner: the row of each token's adapter in what is stacked `[tokens]`, or of all tokens; None: nobody has any.
    """

    segments: Segments
    steps: list[_Added]
    long: list[tuple[int, int, _Held]]
    adds: set[int]
    bare: list[bool | None]
    owner: Tensor | int | None


class Products:
    """What adapters make of each token at modules, in a mixed batch, while `State.products` is this.

    Attributes:
        way: how it is computed.
        dtype: to which wider factors are rounded: that of the tokens. What an adapter costs a step is their reading.
    """

    def __init__(self, way: Way, dtype: torch.dtype = torch.float32):
        self.way, self.dtype = way, dtype
        self._numbers: dict[nn.Module, int] = {}
        self._widths: list[tuple[int, int]] = []
        self._held: dict[str, _Held] = {}
        self._prepared: dict[int, _Prepared] = {}
        self._stacked = _Stacked({})

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def number(self, module: nn.Module, n_in: int, out: int) -> int:
        """Return the number of a module that makes `[out]` of `[in]`; it has to ask this, see `computed`."""
        if module not in self._numbers:
            self._numbers[module] = len(self._widths)
            self._widths.append((n_in, out))
        return self._numbers[module]

    def takes(self, number: int, change: Tokenwise) -> bool:
        """Say whether a change is of a module's size and kernels can read its factors."""
        n_in, out = self._widths[number]
        sizes = ((change.on_input, n_in), (change.gain, out), (change.shift, out))
        fits = all(vector is None or vector.shape == (size,) for vector, size in sizes)
        factors = _update(change)
        return fits and (factors is None or can_be_read(factors, out if change.reads_output else n_in, out))

    @torch.no_grad()
    def take(self, key: str, changes: Mapping[int, Tokenwise]) -> int:
        """Copy what an adapter brings, which is its own from now on.

        Args:
            key: of the adapter.
            changes: by the number of the module. Factors of one device.

        Returns:
            The bytes that they take.

        Raises:
            ValueError: something is not of the module's size, or no kernel can read it.
        """
        if not changes or not all(self.takes(number, change) for number, change in changes.items()):
            raise ValueError(f"what {key} brings is not of the sizes of its modules, or no kernel can read it")
        updates = {number: update for number, one in changes.items() if (update := _update(one)) is not None}
        block, entries = self._in_one_block(updates)
        entries["reads_output"][[number for number, one in changes.items() if one.reads_output]] = 1
        found = {number: _vectors(one) for number, one in changes.items()}
        vectors = {number: each for number, each in found.items() if any(v is not None for v in each)}
        self._held[key] = _Held(block, entries, vectors)
        self._changed(key)
        held = [v for each in vectors.values() for v in each if v is not None]
        return sum(t.numel() * t.element_size() for t in (block, *held))

    def _in_one_block(self, updates: Mapping[int, Update]) -> tuple[Tensor, Entries]:
        """Copy factors behind each other, and write down where each is."""
        entries = np.zeros(len(self._widths), ENTRY)
        if not updates:
            return torch.empty(0), entries
        numbers, all_of = np.array(list(updates)), updates.values()
        held = {
            "a": [(number, one.a) for number, one in updates.items()],
            "b": [(number, one.b.T) for number, one in updates.items()],
            "d": [(number, one.d) for number, one in updates.items() if one.d is not None],
        }
        there = [t for each in held.values() for _, t in each]
        dtypes = {t.dtype for t in there}
        own = dtypes.pop() if len(dtypes) == 1 else torch.float32
        dtype = min(own, self.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        size = sum(t.numel() for t in there)
        block, start = torch.empty(size, dtype=dtype, device=there[0].device), 0
        for name, each in held.items():
            for which, tensors in _alike(each):
                stacked = torch.stack([t.to(own) for t in tensors])
                piece = block[start : start + stacked.numel()].view_as(stacked)
                piece.copy_(stacked)  # one by one takes several times as long
                offsets = np.arange(len(which), dtype=np.uint64) * np.uint64(piece[0].nbytes)
                entries[name][which] = np.uint64(piece.data_ptr()) + offsets
                start += piece.numel()
        entries["rank"][numbers] = [len(one.a) for one in all_of]
        entries["scale"][numbers] = [one.scale for one in all_of]
        entries["f"][numbers] = [FUNCTIONS.index(one.f) for one in all_of]
        entries["type"][numbers] = TYPES[dtype]
        return block, entries

    def drop(self, key: str) -> None:
        """Forget an adapter."""
        self._held.pop(key, None)
        self._changed(key)

    def _changed(self, key: str) -> None:
        """Forget what was made of an adapter that came, or went."""
        self._prepared.clear()
        if key in self._stacked.rows or (key in self and self._held[key].vectors):
            self._stacked = _Stacked(self._held)

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
        owner: Any = prepared.owner
        vectors = None if owner is None else self._stacked.at(number, x)
        on_input, gain, shift = vectors or (None, None, None)
        given = x if on_input is None else _times(x, on_input, owner)
        y = plain(module, given) if bare else usual(module, state, (given,), kwargs)
        if number in prepared.adds:
            y = y.clone() if y.data_ptr() == given.data_ptr() else y.contiguous()  # a block may return what it got
            for step, modules, reads_output in prepared.steps:
                if number in modules:
                    step(number, y.clone() if reads_output else x, y)  # some of y is read while some is added to
            for start, stop, held in prepared.long:
                if number < len(held.entries) and held.entries["rank"][number]:
                    read = y if held.entries["reads_output"][number] else x
                    _add(y[0, start:stop], read[0, start:stop], held.update(number, *self._widths[number]))
        y = y if gain is None else _times(y, gain, owner)
        return y if shift is None else y + _each(shift, owner)

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
        if len(self._prepared) >= _MAPS:
            self._prepared.clear()
        kinds = np.unique(table["reads_output"][table["rank"] > 0]).tolist()
        steps = [self._added(table, runs, bool(reads_output)) for reads_output in kinds]
        adds = {number for step in steps for number in step.modules}
        for _, _, held in long:
            adds |= {*np.flatnonzero(held.entries["rank"]).tolist()}
        made = _Prepared(segments, steps, long, adds, [None] * len(self._widths), self._owner(whose, segments.total))
        self._prepared[id(segments)] = made
        return made

    def _added(self, table: Entries, runs: Runs, reads_output: bool) -> _Added:
        own = table.copy()
        own["rank"][table["reads_output"] != reads_output] = 0
        widths = [(out if reads_output else n_in, out) for n_in, out in self._widths]
        modules = {*np.flatnonzero((own["rank"] > 0).any(1)).tolist()}
        return _Added(self.way.step(own, widths, runs), modules, reads_output)

    def _owner(self, whose: Sequence[tuple[str, Segment]], total: int) -> Tensor | int | None:
        """Write down whose vectors each token gets.

        Raises:
            AttachError: a token would get those of several.
        """
        found = [0] * total
        for key, part in whose:
            row = self._stacked.rows.get(key)
            if row is None:
                continue
            if any(found[part.start : part.stop]):
                raise AttachError(
                    f"{part.who}: of adapters that are kept apart from the model and multiply what a module returns, "
                    "a token can have one. Give each token one of them."
                )
            found[part.start : part.stop] = [row] * _length(part)
        if len({*found}) > 1:
            return torch.tensor(found, device=self._stacked.device)
        return max(found, default=0) or None


def _alike(each: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Tensors of one shape and their numbers, by shape."""
    found: dict[torch.Size, tuple[list[int], list[Tensor]]] = {}
    for number, tensor in each:
        numbers, tensors = found.setdefault(tensor.shape, ([], []))
        numbers.append(number)
        tensors.append(tensor)
    return iter(found.values())


def _length(part: Segment) -> int:
    return part.stop - part.start


def _update(change: Tokenwise) -> Update | None:
    a, b, scale, d, f, *_ = change
    return None if a is None or b is None else Update(a, b, scale, d, f)


def _in_rows(each: Sequence[Tensor | None], neutral: int, x: Tensor) -> Tensor | None:
    """What each adds to the neutral number, behind a row of zeros."""
    first = next((v for v in each if v is not None), None)
    if first is None:
        return None
    zero = torch.zeros_like(first)
    return torch.stack([zero, *(zero if v is None else v - neutral for v in each)]).to(x.device, x.dtype)


def _times(x: Tensor, less_one: Tensor, owner: Tensor | int) -> Tensor:
    return torch.addcmul(x, x, _each(less_one, owner))


def _each(rows: Tensor, owner: Tensor | int) -> Tensor:
    return rows[owner] if isinstance(owner, int) else rows.index_select(0, owner)


def _vectors(change: Tokenwise) -> Vectors:
    on_input, gain, shift = (
        None if v is None else v.detach().to(torch.float32, copy=True)
        for v in (change.on_input, change.gain, change.shift)
    )
    return on_input, gain, shift


def _add(y: Tensor, x: Tensor, update: Update) -> None:
    dtype = thin_dtype(x)
    add_low_rank(y, x, update.a.to(dtype).T, update.b.to(dtype).T, update.scale, update.inner)
