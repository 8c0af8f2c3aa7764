"""Lets adapters know which tokens are padding: what the calls of the model and of its parts say is noted as they run.

Only models that carry an adapter with `counts_tokens` are watched. Below a call nothing is followed: `core.padding`
tells from the shape of what a module gets whose tokens they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapterlab.core.padding import Tokens
from adapterlab.core.state import State
from adapterlab.data.encoding import IGNORED
from adapterlab.engine.wrapping import adapters_of
from adapterlab.foreign.cache import cache_in, held_tokens, plain_mask, without_cache
from adapterlab.foreign.calls import argument_names, swaps_rows
from adapterlab.foreign.model import base_modules, plain_class, text_config, unwrapped


def watch(model: nn.Module, path: str, state: State) -> None:
    """Note what is called around a module, from the model itself down to the last part that takes a batch."""
    if state.calls is None:
        state.calls = []
    parts = path.split(".")
    for around in ("", *(".".join(parts[:i]) for i in range(1, len(parts) + 1))):
        module = unwrapped(model.get_submodule(around))
        watched = any(isinstance(hook, _Enter) for hook in module._forward_pre_hooks.values())
        # Parts of transformers' models that are models themselves say what their batch is called.
        if not watched and (not around or hasattr(module, "main_input_name")):
            module.register_forward_pre_hook(_Enter(state), with_kwargs=True)
            module.register_forward_hook(_Leave(state), always_call=True)


def leave(model: nn.Module, state: State) -> None:
    """Watch no longer, where no adapter asks any more."""
    if state.calls is None or any(a.counts_tokens for _, m in base_modules(model) for a in adapters_of(m).values()):
        return
    state.calls = None
    for _, module in base_modules(model):
        for hooks, kind, beside in (
            (module._forward_pre_hooks, _Enter, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, _Leave, module._forward_hooks_always_called),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
                del hooks[key]
                beside.pop(key, None)


class _Enter:
    """Notes what a call says about its tokens."""

    def __init__(self, state: State):
        self.state = state

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls = self.state.calls
        if calls is None:
            return
        outer = calls[-1] if calls else None
        calls.append(outer)  # what fails here fails the call, and `_Leave` is called for it all the same
        given = {**dict(zip(argument_names(plain_class(module)), args, strict=False)), **kwargs}
        calls[-1] = _called(module, given, outer)


class _Leave:
    """Forgets it again."""

    def __init__(self, state: State):
        self.state = state

    def __call__(self, *_: Any) -> None:
        if self.state.calls:
            self.state.calls.pop()


def _called(module: nn.Module, given: Mapping[str, Any], outer: Any) -> Tokens:
    """What a call says about its tokens."""
    names = argument_names(plain_class(module))
    if "decoder_input_ids" in names:  # around an encoder and a decoder, which are called by themselves
        return _decoded(module, given)
    shape = _shape(given, "input_ids", "inputs_embeds")
    asked, swaps = given.get("logits_to_keep"), swaps_rows(plain_class(module))
    tokens = Tokens(shape, _mask(module, given, shape), 0 if asked is None else asked, swaps)
    states = given.get("encoder_hidden_states")
    if not isinstance(states, Tensor):
        return tokens
    if tokens.mask is None and isinstance(outer, Tokens) and outer.shape == shape:
        tokens.mask = outer.mask
    there = tuple(states.shape[:2])
    tokens.memory, tokens.states = Tokens(there, _plain(given.get("encoder_attention_mask"), there)), states
    return tokens


def _decoded(module: nn.Module, given: Mapping[str, Any]) -> Tokens:
    """The tokens of the decoder; what has no label trains nothing, and fills the row."""
    labels = given.get("labels")
    shape = _shape(given, "decoder_input_ids", "decoder_inputs_embeds")
    if not shape and isinstance(labels, Tensor) and labels.dim() == 2:
        shape = tuple(labels.shape)
    mask = given.get("decoder_attention_mask")
    if mask is not None:
        return Tokens(shape, _plain(mask, shape))
    if isinstance(labels, Tensor) and tuple(labels.shape) == shape:
        return Tokens(shape, functools.partial(torch.ne, labels, IGNORED))
    ids = given.get("decoder_input_ids")
    filler = getattr(text_config(module), "pad_token_id", None)
    return Tokens(shape, functools.partial(_before_filling, ids, filler) if shape and ids is not None else None)


def _before_filling(ids: Tensor, filler: int | None) -> Tensor | None:
    """Everything up to the last token that is no filling; the first one always, with which some models begin."""
    if filler is None:
        return None
    last = (ids != filler).flip(1).cummax(1).values.flip(1)
    last[:, 0] = True
    return last


def _shape(given: Mapping[str, Any], ids: str, embedded: str) -> tuple[int, ...]:
    found = given.get(ids) if given.get(embedded) is None else given[embedded]
    return tuple(found.shape[:2]) if isinstance(found, Tensor) and found.dim() > 1 else ()


def _mask(module: nn.Module, given: Mapping[str, Any], shape: tuple[int, ...]) -> Callable[[], Tensor | None] | None:
    """The mask of a call, of which the last tokens are those that it brings; others are in the cache."""
    mask = given.get("attention_mask")
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2) or not shape:
        return _plain(mask, shape)
    held = 0 if torch.compiler.is_compiling() else held_tokens(cache_in(given))  # now: the first layer adds to it
    rest = without_cache(given)

    def found() -> Tensor | None:
        plain = plain_mask(rest, text_config(module), virtual=-held)
        return None if plain is None else plain[:, -shape[1] :].bool()

    return found


def _plain(mask: Any, shape: tuple[int, ...]) -> Callable[[], Tensor | None] | None:
    """A mask `[rows, tokens]`; one of something else, such as samples of sound, stays as it is and fits nothing."""
    if not isinstance(mask, Tensor):
        return None
    tokens = shape[1] if len(shape) > 1 and mask.dim() == 2 else mask.shape[-1]
    return lambda: mask[..., -tokens:].bool()
