"""Several adapters in one batch: each row of the batch has its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapterlab.errors import AttachError

if TYPE_CHECKING:
    from adapterlab.core.adapter import Adapter
    from adapterlab.core.state import State

Rows = Sequence[tuple[str, ...]]


def mixed(adapters: Mapping[str, Adapter], state: State, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compute a module whose adapters differ from row to row.

    When all of them only add to the output, the base runs once on the whole batch. Otherwise the rows are gathered by
    adapter, and each group runs by itself.

    Args:
        adapters: of the module, by key, in order of attachment.
        state: with the keys for each row of the batch.
        run: the module's own computation.
        args: tensors have the rows in their first dimension, or 1 there.
        kwargs: likewise.
    """
    rows: Rows = state.rows or ()
    here = [tuple(name for name in adapters if name in row) for row in rows]
    if not any(here):
        return run(*args, **kwargs)
    additive = all(adapters[name].additive for row in here for name in row)
    size = max(a.shape[0] for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim())
    if size == 1 and not additive:
        size = len(rows)  # what all rows share, such as position ids
    if size % len(rows):
        raise AttachError(
            f"host.rows names {len(rows)} rows and the batch has {size}: give one entry for each row of the batch."
        )
    # Beam search repeats each row, and experts see rows as runs of tokens: both keep the order of the rows.
    owner = torch.arange(len(rows)).repeat_interleave(size // len(rows))
    groups = {names: owner_of(here, names)[owner].nonzero()[:, 0] for names in dict.fromkeys(here)}
    if additive:
        return _added(adapters, groups, run, *args, **kwargs)
    given = [rows[i] for i in owner.tolist()]
    return _gathered(adapters, groups, given, state, run, args, kwargs)


def owner_of(here: Sequence[tuple[str, ...]], names: tuple[str, ...]) -> Tensor:
    """Which rows use exactly these adapters: a boolean `[rows]`."""
    return torch.tensor([row == names for row in here])


def _added(
    adapters: Mapping[str, Any],
    groups: Mapping[tuple[str, ...], Tensor],
    run: Callable[..., Any],
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    y: Tensor = run(x, *args, **kwargs)
    for names, index in groups.items():
        index = index.to(x.device)
        for name in names:
            y = y.index_add(0, index, adapters[name].added(x[index]).to(y.dtype))
    return y


def _gathered(
    adapters: Mapping[str, Adapter],
    groups: Mapping[tuple[str, ...], Tensor],
    rows: Rows,
    state: State,
    run: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    results, order = [], []
    for names, index in groups.items():
        call = run
        for name in names:
            _check(name, adapters[name])
            call = functools.partial(adapters[name].around, call)
        part_args, part_kwargs = (_take(value, index, len(rows)) for value in (args, kwargs))
        with state.showing([rows[i] for i in index.tolist()]):  # modules inside see the rows of the group alone
            results.append(_spread(call(*part_args, **part_kwargs), len(index)))
        order.append(index)
    back = torch.cat(order).argsort()
    return _join(results, back)


def _check(name: str, adapter: Adapter) -> None:
    if not adapter.rowwise:
        raise AttachError(
            f"Adapter {name!r} ({type(adapter).__qualname__}) mixes information between rows, so it cannot share a "
            "batch with others. Run its rows in a batch of their own, with host.using."
        )


def _take(value: Any, index: Tensor, size: int) -> Any:
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.dim() > 1 and value.shape[0] == size else value
    if isinstance(value, (tuple, list)):
        return type(value)(_take(v, index, size) for v in value)
    if isinstance(value, dict):
        return {k: _take(v, index, size) for k, v in value.items()}
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


def _join(results: list[Any], back: Tensor, inside: bool = False) -> Any:
    first = results[0]
    if type(first).__name__.endswith("Cache"):
        return None  # that of one group would be wrong for the others
    if inside and isinstance(first, Tensor) and len({r.shape[1:] for r in results}) > 1:
        return None  # attention weights over different numbers of keys
    if isinstance(first, Tensor):
        return torch.cat(results)[back.to(first.device)]
    if isinstance(first, tuple) and not hasattr(first, "_fields"):
        return tuple(_join([r[i] for r in results], back, True) for i in range(len(first)))
    if isinstance(first, dict):
        return type(first)(**{k: _join([r[k] for r in results], back, True) for k in first})
    return first
