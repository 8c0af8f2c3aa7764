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

from adapterlab.core.adapter import Affine
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
    """What an adapter brings.

    Attributes:
        block: its factors.
        entries: where they are, by the number of the module.
        vectors: l, g and c of `Affine` in float32, by the number of a module that has one of them.
    """

    block: Tensor
    entries: Entries
    vectors: dict[int, tuple[Tensor | None, Tensor | None, Tensor | None]]

    def update(self, number: int, n_in: int, out: int) -> Update:
        """What it adds to a module of a size, at which it is."""
        _, _, rank, scale, _ = self.entries[number].tolist()
        a, b = (self._piece(number, name, rank * width) for name, width in (("a", n_in), ("b", out)))
        return Update(a.view(rank, n_in), b.view(rank, out).T, scale)

    def _piece(self, number: int, name: str, length: int) -> Tensor:
        start = (int(self.entries[name][number]) - self.block.data_ptr()) // self.block.element_size()
        return self.block[start : start + length]


class _Vectors(NamedTuple):
    """What the owners of a step multiply and add number by number at a module, each in a row; None: nobody does.

    Attributes:
        on_input: l − 1 `[owners, in]`: a small change survives in a half-precision dtype.
        gain: g − 1 `[owners, out]`.
        shift: c `[owners, out]`.
        owner: the row of each token `[tokens]`; None: there is one for all.
    """

    on_input: Tensor | None
    gain: Tensor | None
    shift: Tensor | None
    owner: Tensor | None

    def times(self, x: Tensor, less_one: Tensor) -> Tensor:
        """Multiply x `[1, tokens, n]`."""
        return torch.addcmul(x, x, self._each(less_one))

    def after(self, y: Tensor) -> Tensor:
        """Multiply what a module returned, and add to it."""
        if self.gain is not None:
            y = self.times(y, self.gain)
        return y if self.shift is None else y + self._each(self.shift)

    def _each(self, rows: Tensor) -> Tensor:
        return rows if self.owner is None else rows.index_select(0, self.owner)


class _Owners:
    """Who multiplies and adds number by number in a step, and which tokens are whose."""

    def __init__(self, parts: Sequence[tuple[_Held, Segment]], total: int):
        """Write down the owner of each of so many tokens, counted from 1.

        Raises:
            AttachError: a token has several.
        """
        self.held = list({id(held): held for held, _ in parts}.values())
        rows = {id(held): row for row, held in enumerate(self.held, 1)}
        self.owner = torch.zeros(total, dtype=torch.int64)
        for held, part in parts:
            if self.owner[part.start : part.stop].any():
                raise AttachError(
                    f"{part.who}: of adapters that are kept apart from the model and multiply what a module returns, "
                    "a token can have one. Give each token one of them."
                )
            self.owner[part.start : part.stop] = rows[id(held)]
        self.alone = len(self.held) == 1 and bool(self.owner.all())
        self._made: dict[tuple[int, torch.dtype], _Vectors | None] = {}

    def at(self, number: int, x: Tensor) -> _Vectors | None:
        """What they do at the module of a number, to what is like x."""
        if (number, x.dtype) not in self._made:
            self._made[number, x.dtype] = self._stacked(number, x)
        return self._made[number, x.dtype]

    def _stacked(self, number: int, x: Tensor) -> _Vectors | None:
        each = zip(*(held.vectors.get(number, (None, None, None)) for held in self.held), strict=True)
        on_input, gain, shift = (self._rows(one, neutral, x) for one, neutral in zip(each, (1, 1, 0), strict=True))
        if on_input is gain is shift is None:
            return None
        return _Vectors(on_input, gain, shift, None if self.alone else self.owner.to(x.device))

    def _rows(self, each: Sequence[Tensor | None], neutral: int, x: Tensor) -> Tensor | None:
        """What each adds to the neutral number, behind a row of zeros for tokens of nobody."""
        first = next((v for v in each if v is not None), None)
        if first is None:
            return None
        zero = torch.zeros_like(first)
        rows = [zero if v is None else v - neutral for v in each]
        return torch.stack(rows if self.alone else [zero, *rows]).to(x.device, x.dtype)


class _Prepared(NamedTuple):
    """What a step adds.

    Attributes:
        segments: the map it was made for.
        step: the products of its short runs.
        long: its long runs, and whose they are.
        adds: the modules at which it adds something.
        bare: by module, whether nothing else is computed there; None: nobody has looked.
        owners: those who multiply or add number by number; None: nobody does.
    """

    segments: Segments
    step: Step
    long: list[tuple[int, int, _Held]]
    adds: set[int]
    bare: list[bool | None]
    owners: _Owners | None


class Products:
    """What adapters add to linear modules in a mixed batch, while `State.products` is this.

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

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def number(self, module: nn.Module, n_in: int, out: int) -> int:
        """Return the number of a linear module of `[out, in]`; the module has to ask this, see `computed`."""
        if module not in self._numbers:
            self._numbers[module] = len(self._widths)
            self._widths.append((n_in, out))
        return self._numbers[module]

    def takes(self, number: int, change: Affine) -> bool:
        """Say whether a change is of a module's size and kernels can read its factors."""
        n_in, out = self._widths[number]
        sizes = ((change.on_input, n_in), (change.gain, out), (change.shift, out))
        fits = all(vector is None or vector.shape == (size,) for vector, size in sizes)
        factors = _update(change)
        return fits and (factors is None or can_be_read(factors, n_in, out))

    @torch.no_grad()
    def take(self, key: str, changes: Mapping[int, Affine]) -> int:
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
        found = {number: _vectors(one) for number, one in changes.items()}
        vectors = {number: each for number, each in found.items() if any(v is not None for v in each)}
        self._held[key] = _Held(block, entries, vectors)
        self._prepared.clear()
        held = [v for each in vectors.values() for v in each if v is not None]
        return sum(t.numel() * t.element_size() for t in (block, *held))

    def _in_one_block(self, updates: Mapping[int, Update]) -> tuple[Tensor, Entries]:
        """Copy factors behind each other, and write down where each is."""
        entries = np.zeros(len(self._widths), ENTRY)
        if not updates:
            return torch.empty(0), entries
        numbers, pairs = np.array(list(updates)), list(updates.values())
        dtypes = {t.dtype for one in pairs for t in (one.a, one.b)}
        own = dtypes.pop() if len(dtypes) == 1 else torch.float32
        dtype = min(own, self.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        size = sum(one.a.numel() + one.b.numel() for one in pairs)
        block, start = torch.empty(size, dtype=dtype, device=pairs[0].a.device), 0
        for name, factors in (("a", [one.a for one in pairs]), ("b", [one.b.T for one in pairs])):
            for which in _alike(factors):
                shape = factors[which[0]].shape
                piece = block[start : start + len(which) * shape.numel()].view(len(which), *shape)
                piece.copy_(torch.stack([factors[i].to(own) for i in which]))  # one by one takes several times as long
                offsets = np.arange(len(which), dtype=np.uint64) * np.uint64(piece[0].nbytes)
                entries[name][numbers[which]] = np.uint64(piece.data_ptr()) + offsets
                start += piece.numel()
        entries["rank"][numbers] = [len(one.a) for one in pairs]
        entries["scale"][numbers] = [one.scale for one in pairs]
        entries["type"][numbers] = TYPES[dtype]
        return block, entries

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
        vectors = None if prepared.owners is None else prepared.owners.at(number, x)
        given = x if vectors is None or vectors.on_input is None else vectors.times(x, vectors.on_input)
        y = plain(module, given) if bare else usual(module, state, (given,), kwargs)
        if number in prepared.adds:
            y = y.contiguous()
            prepared.step(number, x, y)
            for start, stop, held in prepared.long:
                if number < len(held.entries) and held.entries["rank"][number]:
                    _add(y[0, start:stop], x[0, start:stop], held.update(number, *self._widths[number]))
        return y if vectors is None else vectors.after(y)

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
        changing = [(held, part) for key, part in whose if (held := self._held[key]).vectors]
        owners = _Owners(changing, segments.total) if changing else None
        made = _Prepared(segments, step, long, adds, [None] * len(self._widths), owners)
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


def _update(change: Affine) -> Update | None:
    return None if change.a is None or change.b is None else Update(change.a, change.b, change.scale)


def _vectors(change: Affine) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    on_input, gain, shift = (
        None if v is None else v.detach().to(torch.float32, copy=True)
        for v in (change.on_input, change.gain, change.shift)
    )
    return on_input, gain, shift


def _add(y: Tensor, x: Tensor, update: Update) -> None:
    dtype = thin_dtype(x)
    add_low_rank(y, x, update.a.to(dtype).T, update.b.to(dtype).T, update.scale)
