"""Several adapters in one batch: each row of the batch, or each token, has its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from adapterlab.core.adapter import READY_FOR_ROWS
from adapterlab.core.composition import Composition, Stack, entered
from adapterlab.core.segments import Here, names_of
from adapterlab.engine.batch_rows import given, lead, tokens_given
from adapterlab.engine.fusion import Base, computed, may_fuse, only_adds
from adapterlab.engine.resting import Padded, behind, factors_at_rest, unchanged
from adapterlab.engine.resting import Rest as AtRest
from adapterlab.engine.taken_apart import Call, Rest, TokenCall, joined
from adapterlab.errors import AttachError
from adapterlab.foreign.calls import argument_names
from adapterlab.foreign.model import plain_class
from adapterlab.ops.low_rank import Span, low_rank_by_row, low_rank_spans

if TYPE_CHECKING:
    from adapterlab.core.adapter import Adapter
    from adapterlab.core.segments import Segments
    from adapterlab.core.state import State


def mixed(
    held: Mapping[str, Adapter], place: str, state: State, run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Compute a module whose adapters differ from row to row, or from token to token.

    When all of them only add to the output, the base runs once on the whole batch. Otherwise each part of the batch
    goes through its adapters by itself, and the base runs once for all that ask it for what it was given.

    Args:
        held: adapters of the module, by key, in order of attachment.
        place: where in the module those stand that are computed.
        state: with the map of the batch.
        run: the module's own computation.
        args: what the module is called with; `batch_rows` says which of it are rows.
        kwargs: likewise.

    Raises:
        AttachError: what the module is given cannot be told apart by rows, or an adapter mixes rows.
    """
    segments: Segments = state.segments  # type: ignore[assignment]
    here = segments.among(tuple(held))
    used = {name: a for name in here.used if (a := held[name]).place == place and not a.idle}
    if not used:
        return run(*args, **kwargs)
    if len(used) < len(here.used):
        here = segments.among(tuple(used))
    call, here = _call(used, here, state, args, kwargs)
    if here.plain and all(adapter.additive for adapter in used.values()):
        return _added(used, here, call, state, run)
    return _by_part(used, here, call, state, run)


def _call(used: Mapping[str, Adapter], here: Here, state: State, args: Any, kwargs: Any) -> tuple[Call, Here]:
    """How the call is taken apart, and the map of the entries that it has."""
    segments, site = here.segments, next(iter(used.values())).site
    x = lead(argument_names(plain_class(site.module)), args, kwargs)
    batch = given(site.path, x, state, segments)
    if not segments.by_token:
        size = batch.rows if x is None or len(x) == 1 else len(x)
        return Call(site, x, batch, size, args, kwargs), here
    for name, adapter in used.items():
        if not adapter.keeps_tokens_apart:
            raise AttachError(
                f"Adapter {name!r} ({type(adapter).__qualname__}) at {site.path or 'the whole model'} may mix tokens, "
                "so it cannot have some of the tokens of a row. Give it whole rows, or run them in a batch of their "
                "own, with host.using."
            )
    seen, dims = tokens_given(site.path, x, batch, segments)
    here = here if seen is segments else seen.among(here.names)
    return TokenCall(site, x, batch, seen.total, args, kwargs, dims), here


def _added(used: Mapping[str, Any], here: Here, call: Call, state: State, run: Callable[..., Any]) -> Tensor:
    x: Tensor = call.args[0] if call.args else call.x
    alone = len(call.args) == 1 and not call.kwargs and tuple(x.shape[: len(call.lead)]) == call.lead
    uneven = len(here.even) > 4 * len(here.parts)
    if alone and (torch.is_grad_enabled() or uneven) and (y := _in_one_node(used, here, state, run, x)) is not None:
        return y
    y = run(*call.args, **call.kwargs)
    x, y = call.flat(x), call.flat(y)
    if not torch.is_grad_enabled() and (share := _in_two_products(used, here, x, y)) is not None:
        return (y + share).unflatten(0, call.lead)
    per = call.size // here.total
    pieces = []
    for who, index in here.groups(per).items():
        part = index if isinstance(index, slice) else index.to(x.device)
        piece, mine = y[part], x[part][None] if call.by_token else x[part]
        with state.seeing(call.x, index, call.by_token), state.drawing(names_of(who)):
            for name in names_of(who):
                share = used[name].added(mine).to(y.dtype)
                piece = piece + (share[0] if call.by_token else share)
        pieces.append(piece)
    back = here.back(per, y.device)
    whole = torch.cat(pieces)
    return (whole if back is None else whole[back]).unflatten(0, call.lead)


def _in_one_node(used: Mapping[str, Any], here: Here, state: State, run: Any, x: Tensor) -> Tensor | None:
    """Base and updates as one node, when all are products of two factors beside a frozen weight at hand."""
    first = next(iter(used.values()))
    if not isinstance(run, Base) or not all(map(only_adds, used.values())) or not may_fuse(first, x):
        return None
    found = {name: adapter.factors() if adapter.is_its_factors else None for name, adapter in used.items()}
    pairs = {name: pair for name, pair in found.items() if pair is not None and used[name].added_bias is None}
    tokens, left = divmod(x.shape[:-1].numel(), here.total)  # of each unit
    if len(pairs) < len(used) or left:
        return None
    spans = []
    for who, start, stop in here.parts:
        for name in names_of(who):
            p = used[name].p if used[name].training else 0.0
            place = (start * tokens, stop * tokens)
            spans.append(Span(*place, *pairs[name], used[name].scale, p, state.generators.get(name)))
    weight, *again = first.site.frozen_weight(x.dtype)
    return low_rank_spans(x, weight, first.site.bias, spans, *again)


def _in_two_products(used: Mapping[str, Any], here: Here, x: Tensor, y: Tensor) -> Tensor | None:
    """The updates of all parts without a gradient, when all are products of two factors that stay as they are."""
    if type(x) is not Tensor or not x.is_floating_point() or x.dtype != y.dtype or torch.compiler.is_compiling():
        return None
    adapters = tuple(used.values())
    kept: _Kept | None = adapters[0].__dict__.get(READY_FOR_ROWS)
    if kept is None or kept.here is not here or not unchanged(kept.made_of, adapters):
        made_of = factors_at_rest(adapters)
        if made_of is None:
            return None
        pairs = {name: (rest.a, rest.scale * rest.b) for name, rest in zip(used, made_of, strict=True)}
        stack = Padded([behind([pairs[name] for name in names_of(who)]) for who in here.even])
        kept = adapters[0].__dict__[READY_FOR_ROWS] = _Kept(here, made_of, stack)
    runs = x.reshape(len(here.even), -1, x.shape[-1])
    return low_rank_by_row(runs, kept.stack.a, kept.stack.b).view(*x.shape[:-1], -1)


class _Kept(NamedTuple):
    here: Here
    made_of: list[AtRest]
    stack: Padded  # of each run


def _by_part(used: Mapping[str, Adapter], here: Here, call: Call, state: State, run: Callable[..., Any]) -> Any:
    shared = all(adapter.shares_base or adapter.additive for adapter in used.values())
    rest = Rest(run, call, here.segments, state, shared)
    # A linear layer in training takes each part by itself, as if it were alone: nodes that hold base and update keep
    # less than what is cut out of a product of all.
    itself = isinstance(run, Base) and torch.is_grad_enabled() and call.site.kind == "linear"
    per = call.size // here.total
    results, counts = [], []
    for who, index in here.groups(per).items():
        part = call.part(who, index)
        compute = run if itself else rest.of(part)
        if names_of(who):
            whole = who if isinstance(who, Composition) else Stack(*who)
            compute = entered(whole, compute, functools.partial(_around, used))
        inside = state.showing(here.inside(who), call.batch_of(part))  # the entries of the part alone
        with inside, state.seeing(call.x, index, call.by_token), state.drawing(names_of(who)):
            results.append(call.spread(compute(*part.args, **part.kwargs), part))
        counts.append(part.count)
    back = here.back(per, torch.device("cpu"))
    return joined(call, results, counts, back)


def _around(adapters: Mapping[str, Adapter], name: str) -> Callable[..., Any] | None:
    adapter = adapters.get(name)
    if adapter is None:
        return None
    if not adapter.rowwise:
        raise AttachError(
            f"Adapter {name!r} ({type(adapter).__qualname__}) mixes information between rows, so it cannot share a "
            "batch with others. Run its rows in a batch of their own, with host.using."
        )
    return functools.partial(computed, adapter)
