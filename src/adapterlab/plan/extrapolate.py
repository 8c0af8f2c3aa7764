"""Layers are alike: a step of a few layers tells what one of many does, exactly."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from adapterlab.errors import AdapterlabError
from adapterlab.foreign.model import is_encoder_decoder, text_config
from adapterlab.plan.child import shared
from adapterlab.plan.setup import Setup
from adapterlab.plan.simulate import ACTIVATIONS, Trace
from adapterlab.plan.tracker import Moment, NeedsNumbers

_Item = TypeVar("_Item")
FEWEST = 3
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers", "block_types")
_WINDOW = re.compile(r"(forward|backward), layer (\d+)")


def extrapolated(setup: Setup, run: Callable[[Setup], Trace], depths: int = 3) -> Trace:
    """Return what a step does, from steps of three small depths if they lie on one line, else from a whole step.

    Args:
        setup: what to train.
        run: simulates a step.
        depths: how many; two do where it is known that three lie on a line.
    """
    depth, period = text_config(setup).num_hidden_layers, _period(setup.config)
    first = FEWEST + (depth - FEWEST) % period if period else depth
    if period == 0 or is_encoder_decoder(setup) or depth <= 3 * (first + period):
        return run(setup)
    try:
        short = [replace(setup, config=cut(setup.config, first + i * period)) for i in range(depths)]
        traces = shared(run, short)
    except NeedsNumbers:
        raise
    except AdapterlabError:  # a method that names layers which the short models lack
        return run(setup)
    ends = [_ends(trace.moments, trace.layers, period) for trace in traces]
    if not _straight(traces, ends):
        return run(setup)
    return _extended(traces, ends, period, depth)


def cut(config: Any, layers: int) -> Any:
    """Return a configuration with the first layers only."""
    short = copy.deepcopy(config)
    text = text_config(short)
    text.num_hidden_layers = layers
    for name in _PER_LAYER:
        if getattr(text, name, None):
            setattr(text, name, list(getattr(text, name))[:layers])
    return short


def _period(config: Any) -> int:
    """After how many layers the pattern of layers repeats; 0 if it does not."""
    text = text_config(config)
    lists = [list(value) for name in _PER_LAYER if (value := getattr(text, name, None))]
    depth = text.num_hidden_layers
    fits = (
        p
        for p in range(1, depth // 2 + 1)
        if all(kinds[i] == kinds[i + p] for kinds in lists for i in range(len(kinds) - p))
    )
    return next(fits, 0)


def _ends(moments: Mapping[str, Moment], layers: int, period: int) -> dict[str, Moment]:
    """Windows by names that every depth has: positions counted from the nearer end; those between lie between."""
    found = {}
    for window, moment in moments.items():
        match = _WINDOW.fullmatch(window)
        if not match:
            found[window] = moment
            continue
        index = int(match[2])
        if index <= period:
            found[f"{match[1]}, layer {index}"] = moment
        if layers - index <= period + 1:
            found[f"{match[1]}, layer {index - layers}"] = moment
    return found


def _straight(traces: list[Trace], ends: list[dict[str, Moment]]) -> bool:
    if any(moments.keys() != ends[0].keys() for moments in ends):
        return False
    totals = [tuple(moments[key].total for moments in ends) for key in ends[0]]
    totals += [tuple(int(t.flops) for t in traces), tuple(t.trainable for t in traces)]
    return all(abs(x - 2 * y + z) <= 64 for line in totals for x, y, z in zip(line, line[1:], line[2:], strict=False))


def _extended(traces: list[Trace], ends: list[dict[str, Moment]], period: int, depth: int) -> Trace:
    """Continue the line through the last two depths."""
    a, b = traces[-2:]
    steps = (depth - b.layers) // period

    def line(x: float, y: float) -> int:
        return round(y + (y - x) * steps)

    moments: dict[str, Moment] = {}
    for key, late in ends[-1].items():
        early = ends[-2][key]
        window = _WINDOW.fullmatch(key)  # of one of the first layers: the others come after it
        front = int(window[2]) + 1 if window else None
        parts = _parts(early.parts, late.parts, a.layers, b.layers, period, steps, front)
        match = re.fullmatch(r"(\w+), layer (-\d+)", key)
        name = f"{match[1]}, layer {depth + int(match[2])}" if match else key
        moment = Moment(line(early.total, late.total), parts)
        if name not in moments or moment.total > moments[name].total:
            moments[name] = moment
    return Trace(
        moments,
        _parts(a.resting, b.resting, a.layers, b.layers, period, steps),
        line(a.flops, b.flops),
        depth,
        line(a.trainable, b.trainable),
        line(a.base, b.base),
        b.loss,
        b.layers,
        (*_repeated(b.groups[:-1], period, steps), *b.groups[-1:]),
    )


def _parts(
    early: Mapping[str, int],
    late: Mapping[str, int],
    few: int,
    more: int,
    period: int,
    steps: int,
    front: int | None = None,
) -> dict[str, int]:
    """Parts of a moment: sums continue; the activations of the middle layers repeat, or of those from `front` on."""
    found: dict[str, int] = {}
    prefix = f"{ACTIVATIONS}, layer "
    for key in {**early, **late}:
        if not key.startswith(prefix):
            x, y = early.get(key, 0), late.get(key, 0)
            found[key] = y + (y - x) * steps
    layers = [late.get(f"{prefix}{i}", 0) for i in range(more)]
    for index, size in enumerate(_repeated(layers, period, steps, front)):
        found[f"{prefix}{index}"] = size
    return {key: size for key, size in found.items() if size}


def _repeated(layers: Sequence[_Item], period: int, steps: int, front: int | None = None) -> list[_Item]:
    """What belongs to each layer of a deeper model: the middle ones come again, or those from `front` on."""
    start = (len(layers) - period) // 2 if front is None else min(front, len(layers) - period)
    return [*layers[:start], *list(layers[start : start + period]) * (steps + 1), *layers[start + period :]]
