"""Rows behind each other instead of padding: whether a model with its adapters can, and why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from adapterlab.data.batching import Collator, PackingCollator, placed
from adapterlab.engine.attachments import attachments
from adapterlab.engine.attention import fast_attention, uses_interface
from adapterlab.engine.loss import Loss
from adapterlab.engine.modes import evaluating
from adapterlab.errors import ConfigError
from adapterlab.foreign.model import attention_limits, is_encoder_decoder, plain_class, text_config

Row = Mapping[str, Sequence[int]]
Collate = Callable[[Sequence[Row]], Mapping[str, Any]]
_PROBE = 12  # tokens of the first row of the probe


def choose(model: Any, collate: Collate, longest: int, wanted: bool | None = None) -> tuple[Collate, str]:
    """Choose how rows become batches.

    Args:
        model: a language model, with or without adapters.
        collate: what pads; one that is not this package's is kept.
        longest: tokens of the longest row.
        wanted: whether to pack; None: whenever it is possible.

    Returns:
        The collator to use, and a sentence that says why.

    Raises:
        ConfigError: packing is wanted and impossible.
    """
    if isinstance(collate, PackingCollator):
        return collate, "rows are packed, without padding"
    if wanted is False:
        return collate, "rows are padded, as asked for"
    why = obstacle(model, collate, longest)
    if why and wanted:
        raise ConfigError(f"packing=true is not possible here: {why}. Set training.packing to null or false.")
    return (collate, f"rows are padded: {why}") if why else (PackingCollator(), "rows are packed, without padding")


def obstacle(model: Any, collate: Collate, longest: int) -> str:
    """Return why rows of a model cannot be packed, or ""."""
    if type(collate) is not Collator:
        return f"{type(collate).__name__} makes the batches"
    if collate.seq2seq or is_encoder_decoder(model):
        return "an encoder-decoder has two texts in a row"
    if not any(uses_interface(plain_class(module)) for module in model.modules()):
        return f"{type(model).__name__} computes attention in its own way"
    return _mixing(model) or _window(model, longest) or _disagreement(model, collate)


def _mixing(model: Any) -> str:
    carrier = attachments(model)
    if carrier and carrier.composition and any(one.by_position for one in carrier.composition.within()):
        return f"{', '.join(map(str, carrier.composition.parts))} tells positions apart"
    for key in carrier.state.active if carrier else ():
        for path, adapter in carrier.adapters(key).items():  # type: ignore[union-attr]
            if not adapter.keeps_tokens_apart:
                return f"what stands around {path or 'the whole model'} may mix positions"
    return ""


def _window(model: Any, longest: int) -> str:
    """A short probe cannot see what happens beyond a window of attention, whose mask packed rows do without."""
    for name, width in attention_limits(model).items():
        if longest > width:
            return f"rows are as long as {longest} tokens, longer than the model's {name} of {width}"
    return ""


@torch.no_grad()
def _disagreement(model: Any, collate: Collate) -> str:
    """Try it: two rows must have the same loss packed as padded.

    The second repeats a part of the first, which helps a model that sees it, and it alone bears labels.
    """
    vocabulary = text_config(model).vocab_size
    ids = [(7 * i * i + 3 * i + 1) % vocabulary for i in range(_PROBE)]
    rows = [
        {"input_ids": ids, "labels": [-100] * _PROBE},
        {"input_ids": ids[4:], "labels": [-100] * 2 + ids[6:]},
    ]
    parameter = next(model.parameters())
    tolerance = 1e-3 if parameter.dtype in (torch.float32, torch.float64) else 2e-2
    losses = []
    with evaluating(model), fast_attention(model):
        loss = Loss(model)
        for make in (collate, PackingCollator()):
            try:
                losses.append(float(loss(placed(make(rows), parameter.device))))
            except Exception as error:  # foreign code that does not know such a batch may fail in any way
                return f"the model does not take such a batch ({type(error).__name__}: {str(error)[:120]})"
    if abs(losses[0] - losses[1]) > tolerance * abs(losses[0]):
        return f"{type(model).__name__} computes another loss then ({losses[1]:.6g} instead of {losses[0]:.6g})"
    return ""
