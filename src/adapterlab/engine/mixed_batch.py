"""Several adapters in one batch: each row of the batch has its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from adapterlab.core.adapter import READY_FOR_ROWS
from adapterlab.core.composition import Composition, Stack, entered, leaves
from adapterlab.engine.batch_rows import Batch, lead, rows_given
from adapterlab.engine.fusion import Base, may_fuse, only_adds
from adapterlab.engine.resting import Padded, Rest, behind, factors_at_rest, unchanged
from adapterlab.errors import AttachError
from adapterlab.foreign.calls import argument_names
from adapterlab.foreign.model import plain_class
from adapterlab.ops.low_rank import Span, low_rank_by_row, low_rank_spans

T = TypeVar("T")

if TYPE_CHECKING:
    from adapterlab.core.adapter import Adapter
    from adapterlab.core.state import State

Row = tuple[str, ...] | Composition
Rows = Sequence[Row]


def mixed(adapters: Mapping[str, Adapter], state: State, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compute a module whose adapters differ from row to row.

    When all of them only add to the output, the base runs once on the whole batch. Otherwise the rows are gathered by
    adapter, and each group runs by itself.

    Args:
        adapters: of the module, by key, in order of attachment.
        state: with the keys for each row of the batch.
        run: the module's own computation.
        args: what the module is called with; `batch_rows` says which of it are rows.
        kwargs: likewise.

    Raises:
        AttachError: what the module is given cannot be told apart by rows, or an adapter mixes rows.
    """
    rows, names = state.rows or (), tuple(adapters)
    here = Here(rows, names) if torch.compiler.is_compiling() else _known(rows, names)
    if not here.used:
        return run(*args, **kwargs)
    used = {name: adapters[name] for name in here.used}
    site = next(iter(used.values())).site
    x = lead(argument_names(plain_class(site.module)), args, kwargs)
    batch = rows_given(site.path, x, state, len(here.rows))
    size = batch.rows if x is None or len(x) == 1 else len(x)
    if here.plain and all(adapter.additive for adapter in used.values()):
        return _added(used, here, size, state, run, *args, **kwargs)
    split = _Split(size, batch, x, here.spread(size))
    return _gathered(adapters, here.groups(size), split, state, run, args, kwargs)


class Here:
    """The rows of a batch as the modules with certain adapters see them, and what is worked out from that once.

    Attributes:
        all: what the rows go through, in the whole model.
        rows: what of it is at these modules, by row.
        used: adapters of at least one row.
        plain: no row has a composition.
    """

    def __init__(self, rows: Rows, names: tuple[str, ...]):
        self.all = rows
        self.rows = [_at_hand(row, names) for row in rows]
        chosen = {name for row in self.rows for name in names_of(row)}
        self.used = tuple(name for name in names if name in chosen)
        self.plain = all(isinstance(row, tuple) for row in self.rows)
        self._derived: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return what was worked out under a key, or work it out."""
        if key not in self._derived:
            self._derived[key] = make()
        made: T = self._derived[key]
        return made

    def owner(self, size: int) -> Tensor:
        """The row of each of `size` entries: beam search repeats rows, and flattened tokens are runs of each row."""
        return torch.arange(len(self.rows)).repeat_interleave(size // len(self.rows))

    def groups(self, size: int) -> dict[Row, Tensor]:
        """The entries of each kind of row, of `size` entries in all."""

        def make() -> dict[Row, Tensor]:
            owner = self.owner(size)
            kinds = dict.fromkeys(self.rows)
            return {row: torch.tensor([r == row for r in self.rows])[owner].nonzero()[:, 0] for row in kinds}

        return self.once(("groups", size), make)

    def spread(self, size: int) -> Rows:
        """What each of `size` entries goes through in the whole model."""
        return self.once(("spread", size), lambda: [self.all[i] for i in self.owner(size).tolist()])

    def runs(self, size: int) -> list[tuple[tuple[str, ...], int, int]]:
        """Neighbours that go through the same adapters: those, the first entry and the one behind the last."""

        def make() -> list[Any]:
            found: list[Any] = []
            for i, row in enumerate(self.rows[i] for i in self.owner(size).tolist()):
                if found and found[-1][0] == row:
                    found[-1][2] = i + 1
                else:
                    found.append([row, i, i + 1])
            return [(names_of(row), start, stop) for row, start, stop in found]

        return self.once(("runs", size), make)

    def back(self, size: int, device: torch.device) -> Tensor | None:
        """Where each entry stands when the groups are put behind each other, or None: in its own place."""

        def make() -> Tensor | None:
            order = torch.cat(list(self.groups(size).values()))
            return None if torch.equal(order, torch.arange(size)) else order.argsort().to(device)

        return self.once(("back", size, device), make)


_known = functools.lru_cache(maxsize=64)(Here)


@dataclass(frozen=True)
class _Split:
    """How a call is taken apart.

    Attributes:
        size: of the first dimension, in which the rows stand.
        batch: what the module is given.
        x: the tensor that says so.
        rows: adapters of each entry of that dimension.
    """

    size: int
    batch: Batch
    x: Tensor | None
    rows: Rows


def names_of(row: Row) -> tuple[str, ...]:
    """The adapters that a row goes through."""
    return leaves(row) if isinstance(row, Composition) else row


def _at_hand(row: Row, adapters: Sequence[str]) -> Row:
    """What a row goes through at a module with these adapters."""
    names = tuple(name for name in adapters if name in names_of(row))
    return row if names and isinstance(row, Composition) else names


def _added(
    used: Mapping[str, Any],
    here: Here,
    size: int,
    state: State,
    run: Callable[..., Any],
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    alone = torch.is_grad_enabled() and not args and not kwargs and len(x) == size
    if alone and (whole := _in_one_node(used, here, run, x)) is not None:
        return whole
    y: Tensor = run(x, *args, **kwargs)
    if len(x) == 1 < size:  # all rows share it
        x, y = x.expand(size, *x.shape[1:]), y.expand(size, *y.shape[1:])
    if not torch.is_grad_enabled() and (share := _in_two_products(used, here, x, y)) is not None:
        return y + share
    pieces = []
    for row, index in here.groups(size).items():
        part = _run_or_index(index, x.device)
        piece = y[part]
        with state.seeing(x, index):
            for name in names_of(row):
                piece = piece + used[name].added(x[part]).to(y.dtype)
        pieces.append(piece)
    back = here.back(size, x.device)
    return torch.cat(pieces) if back is None else torch.cat(pieces)[back]


def _in_one_node(used: Mapping[str, Any], here: Here, run: Any, x: Tensor) -> Tensor | None:
    """Base and updates as one node, when all are products of two factors beside a frozen weight at hand."""
    first = next(iter(used.values()))
    if not isinstance(run, Base) or not all(map(only_adds, used.values())) or not may_fuse(first, x):
        return None
    found = {name: adapter.factors() if adapter.is_its_factors else None for name, adapter in used.items()}
    pairs = {name: pair for name, pair in found.items() if pair is not None and used[name].added_bias is None}
    if len(pairs) < len(used):
        return None
    tokens = x.numel() // x.shape[-1] // len(x)  # of each entry
    spans = []
    for names, start, stop in here.runs(len(x)):
        for name in names:
            a, b = pairs[name]
            p = used[name].p if used[name].training else 0.0
            spans.append(Span(start * tokens, stop * tokens, a, b, used[name].scale, p))
    weight, *again = first.site.frozen_weight(x.dtype)
    return low_rank_spans(x, weight, first.site.bias, spans, *again)


def _run_or_index(index: Tensor, device: torch.device) -> slice | Tensor:
    """Entries that follow each other are a view; others are gathered."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index.to(device)


def _in_two_products(used: Mapping[str, Any], here: Here, x: Tensor, y: Tensor) -> Tensor | None:
    """The updates of all rows without a gradient, when all are products of two factors that stay as they are."""
    if type(x) is not Tensor or not x.is_floating_point() or x.dtype != y.dtype or torch.compiler.is_compiling():
        return None
    adapters = tuple(used.values())
    kept: _Kept | None = adapters[0].__dict__.get(READY_FOR_ROWS)
    if kept is None or kept.here is not here or not unchanged(kept.made_of, adapters):
        made_of = factors_at_rest(adapters)
        if made_of is None:
            return None
        pairs = {name: (rest.a, rest.scale * rest.b) for name, rest in zip(used, made_of, strict=True)}
        stack = Padded([behind([pairs[name] for name in names_of(row)]) for row in here.rows])
        kept = adapters[0].__dict__[READY_FOR_ROWS] = _Kept(here, made_of, stack)
    rows = x.reshape(len(here.rows), -1, x.shape[-1])  # beams and flattened tokens are runs of each row
    return low_rank_by_row(rows, kept.stack.a, kept.stack.b).view(*x.shape[:-1], -1)


class _Kept(NamedTuple):
    here: Here
    made_of: list[Rest]
    stack: Padded  # of each row


def _gathered(
    adapters: Mapping[str, Adapter],
    groups: Mapping[Row, Tensor],
    split: _Split,
    state: State,
    run: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    results, order = [], []
    for row, index in groups.items():
        around = functools.partial(_around, adapters)
        call = entered(row if isinstance(row, Composition) else Stack(*row), run, around) if names_of(row) else run
        part_args, part_kwargs = (_take(value, index, split) for value in (args, kwargs))
        batch = dataclasses.replace(split.batch, rows=split.batch.rows * len(index) // split.size)
        inside = state.showing([split.rows[i] for i in index.tolist()], batch)  # the rows of the group alone
        with inside, state.seeing(split.x, index):
            results.append(_spread(call(*part_args, **part_kwargs), len(index)))
        order.append(index)
    back = torch.cat(order).argsort()
    return _join(results, back)


def _around(adapters: Mapping[str, Adapter], name: str) -> Callable[..., Any] | None:
    adapter = adapters.get(name)
    if adapter is None:
        return None
    if not adapter.rowwise:
        raise AttachError(
            f"Adapter {name!r} ({type(adapter).__qualname__}) mixes information between rows, so it cannot share a "
            "batch with others. Run its rows in a batch of their own, with host.using."
        )
    return adapter.around


def _take(value: Any, index: Tensor, split: _Split) -> Any:
    if isinstance(value, Tensor):
        rows = value is split.x or value.dim() > 1
        told = value is split.x or value.dim() != 2 or not value.is_floating_point()
        if not told and len(value) == split.size == split.batch.tokens:
            raise AttachError(
                f"A tensor of {list(value.shape)} may belong to the rows or to the tokens of a batch that has as many "
                "of both. Run the rows of each adapter in a batch of their own, with host.using."
            )
        return value[index.to(value.device)] if rows and len(value) == split.size else value
    if isinstance(value, (tuple, list)):
        return type(value)(_take(v, index, split) for v in value)
    if isinstance(value, dict):
        return {k: _take(v, index, split) for k, v in value.items()}
    if type(value).__name__.endswith("Cache"):
        raise AttachError(
            "These adapters stand around a whole block or model, whose key-value cache cannot be split by rows. "
            "Generate for each adapter in a batch of its own with host.using, or pass use_cache=False."
        )
    return value


def _spread(result: Any, count: int) -> Any:
    """Repeat a result that all rows of a group share."""
    if isinstance(result, Tensor):
        return result.expand(count, *result.shape[1:]) if result.dim() and result.shape[0] == 1 else result
    if isinstance(result, tuple) and not hasattr(result, "_fields"):
        return tuple(_spread(part, count) for part in result)
    return result


def _joined(results: list[Tensor], back: Tensor) -> Tensor:
    """Put the results of groups behind each other, in the order of the rows; each row may have a run of entries."""
    total = sum(len(r) if r.dim() else 0 for r in results)
    runs, left = divmod(total, len(back))
    if left or not runs:
        raise AttachError(
            f"A result of {[list(r.shape) for r in results]} cannot be put together from {len(back)} rows. Run the "
            "rows of each adapter in a batch of their own, with host.using."
        )
    whole = torch.cat(results)
    return whole.unflatten(0, (len(back), runs))[back.to(whole.device)].flatten(0, 1)


def _join(results: list[Any], back: Tensor, inside: bool = False) -> Any:
    first = results[0]
    if type(first).__name__.endswith("Cache"):
        return None  # that of one group would be wrong for the others
    if inside and isinstance(first, Tensor) and len({r.shape[1:] for r in results}) > 1:
        return None  # attention weights over different numbers of keys
    if isinstance(first, Tensor):
        return _joined(results, back)
    if isinstance(first, tuple) and not hasattr(first, "_fields"):
        return tuple(_join([r[i] for r in results], back, True) for i in range(len(first)))
    if isinstance(first, dict):
        return type(first)(**{k: _join([r[k] for r in results], back, True) for k in first})
    return first
