"""Rows behind each other instead of padding: whether a model with its adapters can, and why not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from adapterlab.data.batching import Collator, PackingCollator, placed
from adapterlab.engine.attachments import attachments
from adapterlab.engine.attention import fast_attention, uses_interface
from adapterlab.engine.loss import Loss
from adapterlab.engine.modes import draws, evaluating
from adapterlab.errors import ConfigError
from adapterlab.foreign.model import attention_limits, is_causal, is_encoder_decoder, plain_class, text_config

Row = Mapping[str, Sequence[int]]
Collate = Callable[[Sequence[Row]], Mapping[str, Any]]
_PROBE = 12  # tokens of the first row of the probe


def choose(
    model: Any, collate: Collate, longest: int, wanted: bool | None = None, shared: bool | None = None
) -> tuple[Collate, str]:
    """Choose how rows become batches.

    Args:
        model: a language model, with or without adapters.
        collate: what pads; one that is not this package's is kept.
        longest: tokens of the longest row.
        wanted: whether to pack; None: whenever it is possible.
        shared: whether packed rows share their opening; None: whenever it is possible.

    Returns:
        The collator to use, and a sentence that says why.

    Raises:
        ConfigError: packing, or sharing, is wanted and impossible.
    """
    if isinstance(collate, PackingCollator):
        return collate, _PACKED + (_SHARED if collate.share else "")
    why = "rows are padded, as asked for" if wanted is False else obstacle(model, collate, longest)
    if why and wanted:
        raise ConfigError(f"packing=true is not possible here: {why}. Set training.packing to null or false.")
    apart = "it is switched off" if shared is False else why or _apart(model)
    if shared and apart:
        raise ConfigError(
            f"shared_openings=true is not possible here: {apart}. Set training.shared_openings to null or false."
        )
    if why:
        return collate, why if wanted is False else f"rows are padded: {why}"
    return PackingCollator(share=not apart), _PACKED + (f"; openings are not shared: {apart}" if apart else _SHARED)


_PACKED = "rows are packed, without padding"
_SHARED = "; what rows of a batch begin with alike is computed once"


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


def _apart(model: Any) -> str:
    """Return why rows that can be packed cannot share their opening, or ""."""
    if not is_causal(model):
        return "tokens see later ones"
    carrier = attachments(model)
    for key in carrier.state.active if carrier else ():
        held: Any = carrier.adapters(key).values()  # type: ignore[union-attr]
        if any(adapter.counts_tokens for adapter in held):
            return f"{key!r} weighs the tokens of a batch"
        if any(adapter.place == "attention" for adapter in held):
            return f"{key!r} stands inside the attention, where it sees whole rows"
    return _draws(model) or _difference(model, PackingCollator(), PackingCollator(share=True), opening=True)


@torch.no_grad()
def _draws(model: Any) -> str:
    """Try it: random numbers of training, such as those of dropout, are to be each row's own."""
    if not model.training:
        return ""
    batch = placed(PackingCollator()(_rows(model, opening=True)), next(model.parameters()).device)
    carrier = attachments(model)
    collected: Any = carrier.state.collect() if carrier else contextlib.nullcontext([])
    try:
        with fast_attention(model), collected as emitted:
            drawn = draws(lambda: Loss(model).hidden(batch))
    except Exception as error:  # foreign code may fail in any way
        return _refusal(error)
    if emitted:
        return "a loss that adapters emit is a mean over the tokens of a batch"
    return "training draws random numbers, which are each row's own" if drawn else ""


def made_up(model: Any, count: int, shift: int = 1) -> list[int]:
    """Return tokens for a trial, of which hardly two behind each other come again."""
    vocabulary = text_config(model).vocab_size
    return [(7 * i * i + 3 * i + shift) % vocabulary for i in range(count)]


def _refusal(error: Exception) -> str:
    return f"the model does not take such a batch ({type(error).__name__}: {str(error)[:120]})"


def _disagreement(model: Any, collate: Collate) -> str:
    return _difference(model, collate, PackingCollator())


def _rows(model: Any, opening: bool) -> list[Row]:
    """Two rows for a trial: the second repeats a part of the first, which helps a model that sees it.

    The second alone bears labels; with an opening they begin alike, and both do.
    """
    ids = made_up(model, _PROBE)
    if opening:
        other = ids[:-3] + ids[2:4]
        return [{"input_ids": row, "labels": [-100] * (_PROBE - 2) + row[_PROBE - 2 :]} for row in (ids, other)]
    return [
        {"input_ids": ids, "labels": [-100] * _PROBE},
        {"input_ids": ids[4:], "labels": [-100] * 2 + ids[6:]},
    ]


@torch.no_grad()
def _difference(model: Any, one: Collate, other: Collate, *, opening: bool = False) -> str:
    """Try it: rows must have the same loss in both kinds of batches; return how it differs, or ""."""
    rows = _rows(model, opening)
    parameter = next(model.parameters())
    tolerance = 1e-3 if parameter.dtype in (torch.float32, torch.float64) else 2e-2
    losses = []
    with evaluating(model), fast_attention(model):
        loss = Loss(model)
        for make in (one, other):
            try:
                losses.append(float(loss(placed(make(rows), parameter.device))))
            except Exception as error:  # foreign code that does not know such a batch may fail in any way
                return _refusal(error)
    if abs(losses[0] - losses[1]) > tolerance * abs(losses[0]):
        return f"{type(model).__name__} computes another loss then ({losses[1]:.6g} instead of {losses[0]:.6g})"
    return ""
