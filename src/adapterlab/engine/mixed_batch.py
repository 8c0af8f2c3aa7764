"""Several adapters in one batch: each row of the batch has its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapterlab.core.composition import Composition, Stack, entered, leaves
from adapterlab.engine.batch_rows import Batch, lead, rows_given
from adapterlab.errors import AttachError
from adapterlab.foreign.calls import argument_names
from adapterlab.foreign.model import plain_class

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
    rows: Rows = state.rows or ()
    here = [_at_hand(row, adapters) for row in rows]
    if not any(map(names_of, here)):
        return run(*args, **kwargs)
    used = {name: adapters[name] for row in here for name in names_of(row) if name in adapters}
    site = next(iter(used.values())).site
    x = lead(argument_names(plain_class(site.module)), args, kwargs)
    batch = rows_given(site.path, x, state, len(rows))
    size = batch.rows if x is None or len(x) == 1 else len(x)
    # Beam search repeats each row, and flattened tokens are runs of each row: both keep the order of the rows.
    owner = torch.arange(len(rows)).repeat_interleave(size // len(rows))
    groups = {row: owner_of(here, row)[owner].nonzero()[:, 0] for row in dict.fromkeys(here)}
    if all(adapter.additive for adapter in used.values()) and all(isinstance(row, tuple) for row in here):
        return _added(adapters, groups, state, run, *args, **kwargs)
    split = _Split(size, batch, x, [rows[i] for i in owner.tolist()])
    return _gathered(adapters, groups, split, state, run, args, kwargs)


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


def _at_hand(row: Row, adapters: Mapping[str, Any]) -> Row:
    """What a row goes through at a module with these adapters."""
    names = tuple(name for name in adapters if name in names_of(row))
    return row if names and isinstance(row, Composition) else names


def owner_of(here: Rows, wanted: Row) -> Tensor:
    """Which rows go through exactly this: a boolean `[rows]`."""
    return torch.tensor([row == wanted for row in here])


def _added(
    adapters: Mapping[str, Any],
    groups: Mapping[Any, Tensor],
    state: State,
    run: Callable[..., Any],
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    y: Tensor = run(x, *args, **kwargs)
    size = sum(map(len, groups.values()))
    if len(x) == 1 < size:  # all rows share it
        x, y = x.expand(size, *x.shape[1:]), y.expand(size, *y.shape[1:])
    for names, index in groups.items():
        index = index.to(x.device)
        with state.seeing(x, index):
            for name in names:
                y = y.index_add(0, index, adapters[name].added(x[index]).to(y.dtype))
    return y


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
