"""What is a row of a mixed batch: followed from the model's own input down to every module that adapters are on.

The outermost call says how many rows and tokens there are. A module below has rows in what it is given if that begins
with as many rows, with all tokens of all rows behind each other, or with the parts that rows were cut into. Whatever
else it is given is not told apart by guessing: what all rows share (positions) is computed for all, and tokens that a
router chose, or tensors of another order, are refused.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterlab.errors import AttachError
from adapterlab.foreign.cache import NAMES as CACHES
from adapterlab.foreign.calls import argument_names, swaps_rows
from adapterlab.foreign.model import ADAPTERS, plain_class, stacks

if TYPE_CHECKING:
    from adapterlab.core.state import State


@dataclass(frozen=True)
class Batch:
    """What a module is given.

    Attributes:
        rows: how many rows there are, those of beams counted each.
        tokens: positions of a row; None where that is not told.
        ids: they are numbers of tokens, and no values yet.
        swaps: a module around exchanges rows and tokens of something, so that a square may stand either way.
    """

    rows: int
    tokens: int | None
    ids: bool
    swaps: bool = False


def lead(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first tensor that a module is called with, in the order of its forward's arguments."""
    named = sorted(kwargs, key=lambda name: names.index(name) if name in names else len(names))
    return next((v for v in (*args, *(kwargs[n] for n in named)) if isinstance(v, Tensor) and v.dim()), None)


def below(x: Tensor, batch: Batch | str | None, wanted: int, chosen: bool = False) -> Batch | str:
    """Say what rows a module is given, from what the module around it is.

    Args:
        x: the first tensor that it is given.
        batch: of the module around it; None for the outermost; a reason where there are no rows any more.
        wanted: how many rows have adapters.
        chosen: it is one of several in a list, of which a router may choose.

    Returns:
        The rows, or why there are none.

    Raises:
        AttachError: the outermost call has another number of rows.
    """
    if isinstance(batch, str):
        return batch
    count, ids = len(x), not x.is_floating_point()
    tokens = x.shape[1] if x.dim() == (2 if ids else 3) else None
    if batch is None:
        if count % wanted:
            raise AttachError(
                f"host.rows names {wanted} rows and the batch has {count}: give one entry for each row of the batch."
            )
        return Batch(count, tokens, ids)
    if ids:
        return _of_ids(x, batch, tokens)
    shape, whole = list(x.shape), batch.rows * (batch.tokens or 0)
    if chosen and x.dim() == 2:
        return f"it is one of several modules that tokens may be chosen for, and gets {shape}"
    if count == batch.rows:
        if batch.swaps and tokens == count == batch.tokens:
            return f"it gets {shape}, and the model goes by time first, so that rows and tokens cannot be told apart"
        return replace(batch, tokens=1 if x.dim() == 2 else tokens, ids=False)
    if x.dim() == 2 and count == whole:
        return replace(batch, ids=False)
    cut = x.dim() > 3 or (tokens is not None and count * tokens == whole)
    if x.dim() > 2 and cut and count % batch.rows == 0 and x.shape[1] != batch.rows:
        return replace(batch, rows=count, tokens=tokens, ids=False)
    return f"it gets {shape}, where the batch has {batch.rows} rows of {batch.tokens or 'unknown'} tokens"


def _of_ids(x: Tensor, batch: Batch, tokens: int | None) -> Batch | str:
    """Numbers choose rows of a table: those of tokens belong to a row, those of positions may be shared by all."""
    if x.dim() > 1 and len(x) == 1 != batch.rows:
        return replace(batch, tokens=tokens, ids=True)
    if x.dim() > 1 and len(x) == batch.rows and batch.ids:
        return replace(batch, tokens=tokens, ids=True)
    return f"it gets numbers {list(x.shape)} that were made inside the model, not of its {batch.rows} rows"


def rows_given(path: str, x: Tensor | None, state: State, wanted: int) -> Batch:
    """Say what rows a module with adapters is given.

    Args:
        path: of the module.
        x: the first tensor that it is given.
        state: knows what the modules around it were given.
        wanted: how many rows have adapters.

    Raises:
        AttachError: there are no rows in what it is given.
    """
    outer = state.batches[-1] if state.batches else None
    found = outer or "it gets no tensor" if x is None else below(x, outer, wanted)
    if isinstance(found, str):
        raise AttachError(
            f"The adapters of a mixed batch cannot be told apart at {path}: {found}. Run the rows of each adapter in a "
            "batch of their own, with host.using."
        )
    return found


@contextlib.contextmanager
def followed(model: nn.Module, paths: Iterable[str], state: State, wanted: Callable[[], int]) -> Iterator[None]:
    """Note inside the context what rows each module with adapters, and each module around one, is given.

    Args:
        model: the root.
        paths: of the modules with adapters.
        state: shared by the adapters.
        wanted: tells how many rows have adapters.
    """
    around = {""} | {path for whole in paths for path in _prefixes(whole)}
    handles: list[Any] = []
    try:
        for path in around:
            module = model.get_submodule(path)
            parent = model.get_submodule(path.rpartition(".")[0]) if path else None
            chosen = isinstance(parent, (nn.ModuleList, nn.ModuleDict))
            enter = _Enter(state, wanted, plain_class(module), chosen)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(_Leave(state), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        state.batches.clear()


@contextlib.contextmanager
def repeated(model: nn.Module, state: State) -> Iterator[None]:
    """Repeat the batch of each call of the model inside the context: once for each of the rows that `state` names."""
    rows, names = state.rows or (), argument_names(plain_class(model))

    def repeat(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if any(kwargs.get(name) is not None for name in CACHES):
            raise AttachError(
                "Parallel repeats the batch of each call, and a key-value cache holds the batch of the call before. "
                "Name the rows instead, and generate for them all: with host.rows([...]): model.generate(...)."
            )
        x = lead(names, args, kwargs)
        size = 0 if x is None else len(x)

        def spread(value: Any) -> Any:
            alike = isinstance(value, Tensor) and value.dim() and len(value) == size
            return torch.cat([value] * len(rows)) if alike else value

        state.rows = tuple(row for row in rows for _ in range(size))
        return tuple(map(spread, args)), {key: spread(value) for key, value in kwargs.items()}

    handles: list[Any] = [model.register_forward_pre_hook(repeat, with_kwargs=True, prepend=True)]
    for layer in _trunk(model):
        once = _Once(len(rows), state)
        handles.append(layer.register_forward_pre_hook(once.enter, with_kwargs=True))
        handles.append(layer.register_forward_hook(once.leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trunk(model: nn.Module) -> Iterator[nn.Module]:
    """The first layers of each stack, up to the first that has an adapter which is not passed over."""

    def adapted(layer: nn.Module) -> bool:
        held = (module._modules.get(ADAPTERS) for module in layer.modules())
        return any(not getattr(adapter, "idle", False) for one in held if one is not None for adapter in one.children())

    for stack in stacks(model).values():
        yield from itertools.takewhile(lambda layer: not adapted(layer), stack)


class _Once:
    """Computes a layer for the rows of the first part alone, where those of all parts are the same as yet."""

    def __init__(self, parts: int, state: State):
        self.parts, self.state, self.cut = parts, state, False

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Take the first rows of everything, if that is sure to be what the other parts have."""
        rows = len(self.state.rows or ())
        values = [inner for value in (*args, *kwargs.values()) for inner in (value if _is_tuple(value) else (value,))]
        tensors = [value for value in values if isinstance(value, Tensor) and value.dim() > 1]
        plain = all(value is None or isinstance(value, (Tensor, bool, int, float)) for value in values)  # no cache
        square = any(t.dim() > 2 and t.shape[1] == rows for t in tensors)  # tokens cannot be told from rows
        self.cut = plain and not square and not module.training  # each part draws dropout of its own
        self.cut = self.cut and any(len(t) == rows for t in tensors)
        self.cut = self.cut and all(len(t) == 1 or (len(t) == rows and self._alike(t)) for t in tensors)
        if not self.cut:
            return None

        def first(value: Any) -> Any:
            if _is_tuple(value):
                return tuple(map(first, value))
            whole = isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows
            return value[: rows // self.parts] if whole else value

        return tuple(map(first, args)), {key: first(value) for key, value in kwargs.items()}

    def leave(self, module: nn.Module, args: Any, y: Any) -> Any:
        """Give every part what came out."""
        if not self.cut:
            return y
        self.cut = False
        each = [torch.cat([t] * self.parts) if isinstance(t, Tensor) else t for t in (y if _is_tuple(y) else (y,))]
        return tuple(each) if _is_tuple(y) else each[0]

    def _alike(self, t: Tensor) -> bool:
        first, *others = t.chunk(self.parts)
        return all(torch.equal(first, other) for other in others)


def _is_tuple(value: Any) -> bool:
    return isinstance(value, tuple)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


class _Enter:
    """Notes what a module is given."""

    def __init__(self, state: State, wanted: Callable[[], int], cls: Any, chosen: bool):
        self.state, self.wanted, self.chosen = state, wanted, chosen
        self.names, self.swaps = argument_names(cls), swaps_rows(cls)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        batches, x = self.state.batches, lead(self.names, args, kwargs)
        outer = batches[-1] if batches else None
        # What fails here fails the call, and `_Leave` is called for it all the same.
        batches.append(outer)
        if x is not None:
            found = below(x, outer, self.wanted(), self.chosen)
            batches[-1] = replace(found, swaps=True) if self.swaps and isinstance(found, Batch) else found


class _Leave:
    """Forgets it again."""

    def __init__(self, state: State):
        self.state = state

    def __call__(self, *_: Any) -> None:
        if self.state.batches:
            self.state.batches.pop()
