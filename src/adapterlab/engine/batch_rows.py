"""What is a row or a token of a mixed batch: followed from the model's own input down to every module with adapters.

The outermost call says how many rows and tokens there are. A module below has rows in what it is given if that begins
with as many rows, with all tokens of all rows behind each other, or with the parts that rows were cut into. Whatever
else it is given is not told apart by guessing: what all rows share (positions) is computed for all, and tokens that a
router chose, or tensors of another order, are refused. Tokens are all there, or those that the head was asked for.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterlab.core.segments import Segments
from adapterlab.core.site import is_plain_linear
from adapterlab.errors import AttachError
from adapterlab.foreign.cache import NAMES as CACHES
from adapterlab.foreign.calls import BOUNDS, argument_names, swaps_rows
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
        shape: rows and tokens of the outermost call, or of the part of it that is computed.
        asked: what that call wants logits of: the last so many positions, or these; 0: all.
    """

    rows: int
    tokens: int | None
    ids: bool
    swaps: bool = False
    shape: tuple[int, int] = (0, 0)
    asked: int | Tensor = 0


def lead(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first tensor that a module is called with, in the order of its forward's arguments."""
    if args and isinstance(args[0], Tensor) and args[0].dim():  # of most modules, hundreds of times a step
        return args[0]
    known = (kwargs[name] for name in names if name in kwargs)
    others = (value for name, value in kwargs.items() if name not in names)
    return next((v for v in itertools.chain(args, known, others) if isinstance(v, Tensor) and v.dim()), None)


def outermost(x: Tensor, segments: Segments, asked: Any = 0) -> Batch:
    """Say what rows and tokens the outermost call has.

    Args:
        x: the first tensor that it is given.
        segments: who owns them.
        asked: what it wants logits of.

    Raises:
        AttachError: they are not as many as have owners.
    """
    count, ids, wanted = len(x), not x.is_floating_point(), segments.total
    tokens = x.shape[1] if x.dim() == (2 if ids else 3) else None
    if not segments.by_token:
        if not wanted or count % wanted:
            raise AttachError(
                f"host.rows names {wanted} rows and the batch has {count}: give one entry for each row of the batch."
            )
        return Batch(count, tokens, ids, asked=asked)
    tokens = 1 if x.dim() == (1 if ids else 2) else tokens
    if tokens is None or count * tokens != wanted:
        what = f"{list(x.shape)}" if tokens is None else f"{count} rows of {tokens} tokens, {count * tokens} in all"
        raise AttachError(
            f"host.tokens names {wanted} tokens and the batch has {what}: give counts that add up to rows · length of "
            "the call, padding included. Steps of generation have other counts: they take host.rows."
        )
    return Batch(count, tokens, ids, shape=(count, tokens), asked=asked)


def below(x: Tensor, batch: Batch | str, chosen: bool = False) -> Batch | str:
    """Say what rows a module is given, from what the module around it is.

    Args:
        x: the first tensor that it is given.
        batch: of the module around it; a reason where there are no rows any more.
        chosen: it is one of several in a list, of which a router may choose.

    Returns:
        The rows, or why there are none.
    """
    if isinstance(batch, str):
        return batch
    count, ids = len(x), not x.is_floating_point()
    tokens = x.shape[1] if x.dim() == (2 if ids else 3) else None
    if ids:
        return _of_ids(x, batch, tokens)
    shape, whole = list(x.shape), batch.rows * (batch.tokens or 0)
    if chosen and x.dim() == 2:
        return f"it is one of several modules that tokens may be chosen for, and gets {shape}"
    if count == batch.rows:
        if batch.swaps and tokens == count == batch.tokens:
            return f"it gets {shape}, and the model goes by time first, so that rows and tokens cannot be told apart"
        tokens = 1 if x.dim() == 2 else tokens
        return batch if tokens == batch.tokens and not batch.ids else replace(batch, tokens=tokens, ids=False)
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


def given(path: str, x: Tensor | None, state: State, segments: Segments) -> Batch:
    """Say what rows a module with adapters is given.

    Args:
        path: of the module.
        x: the first tensor that it is given.
        state: knows what the modules around it were given.
        segments: who owns them.

    Raises:
        AttachError: there are no rows in what it is given.
    """
    outer = state.batches[-1] if state.batches else None
    if x is None:
        found = outer or "it gets no tensor"
    else:
        found = outermost(x, segments) if outer is None else below(x, outer)
    if isinstance(found, str):
        raise AttachError(_APART.format(path=path, why=found))
    return found


def all_there(x: Tensor, state: State) -> bool:
    """Say whether x `[..., width]` is sure to have all rows, or all tokens, of a mixed batch in their places."""
    batch = state.batches[-1] if state.batches else None
    if batch is None or isinstance(batch, str) or batch.swaps:
        return False
    if state.segments.by_token:  # type: ignore[union-attr]
        return x.shape[:-1] in (batch.shape, (batch.shape[0] * batch.shape[1],))
    return x.dim() == 3 and len(x) == batch.rows


_APART = (
    "The adapters of a mixed batch cannot be told apart at {path}: {why}. Run the rows of each adapter in a batch of "
    "their own, with host.using."
)


def tokens_given(path: str, x: Tensor | None, batch: Batch, segments: Segments) -> tuple[Segments, int]:
    """Say which tokens a module with adapters is given, where tokens have owners.

    Args:
        path: of the module.
        x: the first tensor that it is given.
        batch: what of rows that is.
        segments: who owns the tokens of the batch.

    Returns:
        Who owns the tokens that it is given, and how many of the first dimensions count them.

    Raises:
        AttachError: they cannot be told.
    """
    why = "it gets no tensor"
    if x is not None:
        ids, (rows, tokens) = not x.is_floating_point(), batch.shape
        dims = x.dim() if ids else x.dim() - 1
        lead = tuple(x.shape[:dims])
        if lead in ((rows, tokens), (rows * tokens,)) or (ids and lead == (1, tokens)):
            return segments, dims
        asked = torch.arange(rows * tokens).view(rows, tokens)[:, _positions(batch.asked)]
        if lead == tuple(asked.shape):
            return segments.chosen(asked.flatten()), dims
        why = f"it gets {list(x.shape)}, in which the {rows} rows of {tokens} tokens are not to be found"
        if dims > 2:
            why += "; what mixes the tokens of a row takes rows, or packed samples, with one owner each"
    raise AttachError(_APART.format(path=path, why=why))


def _positions(asked: int | Tensor) -> slice | Tensor:
    """The positions of a row that logits are wanted of."""
    if isinstance(asked, Tensor) and asked.dim():
        return asked.cpu()
    return slice(-int(asked) or None, None)


@contextlib.contextmanager
def followed(model: nn.Module, paths: Iterable[str], state: State, wanted: Callable[[], Segments]) -> Iterator[None]:
    """Note inside the context what rows each module with adapters, and each module around one, is given.

    Args:
        model: the root.
        paths: of the modules with adapters.
        state: shared by the adapters.
        wanted: tells who owns the rows or tokens of a call.
    """
    around = {""} | {path for whole in paths for path in _prefixes(whole)}
    handles: list[Any] = []
    try:
        for path in around:
            module = model.get_submodule(path)
            parent = model.get_submodule(path.rpartition(".")[0]) if path else None
            chosen = isinstance(parent, (nn.ModuleList, nn.ModuleDict))
            if path and not chosen and is_plain_linear(plain_class(module)):
                continue  # the module around it says as much
            calls = _Calls(state, wanted, plain_class(module), chosen)
            handles.append(module.register_forward_pre_hook(calls.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(calls.leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        state.batches.clear()


@contextlib.contextmanager
def repeated(model: nn.Module, state: State) -> Iterator[None]:
    """Repeat the batch of each call of the model inside the context: once for each of the rows that `state` names."""
    parts, names = state.segments or Segments(()), argument_names(plain_class(model))

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
            return torch.cat([value] * parts.total) if alike else value

        state.segments = parts.repeated(size)
        return tuple(map(spread, args)), {key: spread(value) for key, value in kwargs.items()}

    handles: list[Any] = [model.register_forward_pre_hook(repeat, with_kwargs=True, prepend=True)]
    for layer in _trunk(model):
        once = _Once(parts.total, state)
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
        rows = self.state.segments.total if self.state.segments else 0
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


class _Calls:
    """Notes what a module is given, and forgets it again; in the outermost call the map of the batch is settled."""

    def __init__(self, state: State, wanted: Callable[[], Segments], cls: Any, chosen: bool):
        self.state, self.wanted, self.chosen = state, wanted, chosen
        self.names, self.swaps = argument_names(cls), swaps_rows(cls)
        self.before: list[Segments | None] = []

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note it."""
        state, x = self.state, lead(self.names, args, kwargs)
        outer = state.batches[-1] if state.batches else None
        # What fails here fails the call, and `leave` is called for it all the same.
        state.batches.append(outer)
        self.before.append(state.segments)
        if x is None:
            return
        found = self.first(x, kwargs) if outer is None else below(x, outer, self.chosen)
        state.batches[-1] = replace(found, swaps=True) if self.swaps and isinstance(found, Batch) else found

    def first(self, x: Tensor, kwargs: Mapping[str, Any]) -> Batch:
        """Note the outermost call."""
        wanted, asked = self.wanted(), kwargs.get("logits_to_keep")
        found = outermost(x, wanted, 0 if asked is None else asked)
        if self.state.segments is not None and found.tokens is not None:
            self.state.segments = wanted.settled(found.rows, found.tokens, kwargs.get(BOUNDS))
        return found

    def leave(self, *_: Any) -> None:
        """Forget it."""
        if self.before:
            self.state.segments = self.before.pop()
            self.state.batches.pop()
