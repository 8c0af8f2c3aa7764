"""Several adapters in one batch: each row of the batch, or each token, has its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapterlab.core.composition import Composition, Stack, entered
from adapterlab.core.segments import Here, names_of
from adapterlab.engine.batch_rows import given, lead, tokens_given
from adapterlab.engine.fusion import Base, computed, may_fuse, only_adds
from adapterlab.engine.taken_apart import Call, Rest, TokenCall, joined
from adapterlab.errors import AttachError
from adapterlab.foreign.calls import argument_names
from adapterlab.foreign.model import plain_class
from adapterlab.ops.low_rank import Span, low_rank_spans

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
    x: Any = call.args[0] if call.args else call.x
    joins = x.shape[: len(call.lead)] == call.lead and len(call.args) == 1 and not call.kwargs
    if joins and (node := _in_one_node(used, here, state, run, x)) is not None:
        return node
    if _takes_parts(call, run):
        apart: Tensor = _by_part(used, here, call, state, run)
        return apart
    y = run(*call.args, **call.kwargs)
    x, y = call.flat(x), call.flat(y)
    per = call.size // here.total
    pieces = []
    for who, index in here.groups(per).items():
        part = index if isinstance(index, slice) else index.to(x.device)
        piece, mine = y[part], x[part][None] if call.by_token else x[part]
        with state.seeing(call.x, index, call.by_token), state.acting(names_of(who)):
            for name in names_of(who):
                share = used[name].added(mine).to(y.dtype)
                piece = piece + (share[0] if call.by_token else share)
        pieces.append(piece)
    back = here.back(per, y.device)
    joint = torch.cat(pieces)
    return (joint if back is None else joint[back]).unflatten(0, call.lead)


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
            (a, b), adapter = pairs[name], used[name]
            p, draw = adapter.p if adapter.training else 0.0, state.generators.get(name)
            spans.append(Span(start * tokens, stop * tokens, a, b, adapter.scale, p, draw))
    weight, *again = first.site.frozen_weight(x.dtype)
    return low_rank_spans(x, weight, first.site.bias, spans, *again)


def _takes_parts(call: Call, run: Any) -> bool:
    """Say whether each part is computed by itself, as if it were alone, base included: linear layers in training.

    Nodes that hold base and update keep less than what is cut out of a product of all, and draw their dropout in their
    own way.
    """
    return isinstance(run, Base) and torch.is_grad_enabled() and call.site.kind == "linear"


def _by_part(used: Mapping[str, Adapter], here: Here, call: Call, state: State, run: Callable[..., Any]) -> Any:
    shared = all(adapter.shares_base or adapter.additive for adapter in used.values())
    rest = Rest(run, call, here, state, shared)
    itself = _takes_parts(call, run)
    per = call.size // here.total
    results, counts = [], []
    for who, index in here.groups(per).items():
        part = call.part(who, index)
        compute = run if itself else rest.of(part)
        if names_of(who):
            whole = who if isinstance(who, Composition) else Stack(*who)
            compute = entered(whole, compute, functools.partial(_around, used))
        inside = state.showing(here.inside(who), call.batch_of(part))  # the entries of the part alone
        with inside, state.seeing(call.x, index, call.by_token), state.acting(names_of(who)):
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
