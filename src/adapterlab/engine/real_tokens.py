"""Lets adapters know which tokens are padding: what the calls of the model and of its parts say is noted as they run.

Only models that carry an adapter with `counts_tokens` are watched. Below a call nothing is followed: `core.padding`
tells from the shape of what a module gets whose tokens they are.
"""

from __future__ import annotations

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
            module.register_forward_pre_hook(_Enter(state, module), with_kwargs=True)
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

    def __init__(self, state: State, module: nn.Module):
        cls, config = plain_class(module), text_config(module)
        self.state, self.names, self.swaps = state, argument_names(cls), swaps_rows(cls)
        self.filler, self.config = getattr(config, "pad_token_id", None), config

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls = self.state.calls
        if calls is None:
            return
        outer = calls[-1] if calls else None
        calls.append(outer)  # what fails here fails the call, and `_Leave` is called for it all the same
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        calls[-1] = self.decoded(given, outer) if "decoder_input_ids" in self.names else self.called(given, outer)

    def called(self, given: Mapping[str, Any], outer: Any) -> Tokens:
        """What the call of a model says, of an encoder, or of a decoder."""
        shape, asked = _shape(given, "input_ids", "inputs_embeds"), given.get("logits_to_keep")
        tokens = Tokens(shape, self.mask(given, shape), 0 if asked is None else asked, self.swaps)
        states = given.get("encoder_hidden_states")
        if not isinstance(states, Tensor):
            return tokens
        if tokens.mask is None and isinstance(outer, Tokens) and outer.shape == shape:
            tokens.mask = outer.mask
        there = tuple(states.shape[:2])
        tokens.memory, tokens.states = Tokens(there, _plain(given.get("encoder_attention_mask"), there)), states
        return tokens

    def decoded(self, given: Mapping[str, Any], outer: Any) -> Tokens:
        """What a call around an encoder and a decoder says about the decoder's tokens.

        Those without a label train nothing, and fill the row.
        """
        labels, ids = given.get("labels"), given.get("decoder_input_ids")
        shape = _shape(given, "decoder_input_ids", "decoder_inputs_embeds")
        if not shape and isinstance(labels, Tensor) and labels.dim() == 2:
            shape = tuple(labels.shape)
        mask = given.get("decoder_attention_mask")
        if mask is not None:
            return Tokens(shape, _plain(mask, shape))
        if isinstance(labels, Tensor) and tuple(labels.shape) == shape:
            return Tokens(shape, lambda: labels != IGNORED)
        if isinstance(outer, Tokens) and outer.shape == shape:  # the head's call knew the labels
            return Tokens(shape, outer.mask)
        if not isinstance(ids, Tensor) or self.filler is None:
            return Tokens(shape)
        return Tokens(shape, lambda: _before_filling(ids, self.filler))

    def mask(self, given: Mapping[str, Any], shape: tuple[int, ...]) -> Callable[[], Tensor | None] | None:
        """The mask of a call, of which the last tokens are those that it brings; others are in the cache."""
        mask = given.get("attention_mask")
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2) or not shape:
            return _plain(mask, shape)
        # Now, since the first layer adds to it; a compiled call, which generates, has no use for it.
        held = 0 if torch.compiler.is_compiling() else held_tokens(cache_in(given))
        rest = without_cache(given)

        def found() -> Tensor | None:
            plain = plain_mask(rest, self.config, virtual=-held)
            return None if plain is None else plain[:, -shape[1] :].bool()

        return found


class _Leave:
    """Forgets it again."""

    def __init__(self, state: State):
        self.state = state

    def __call__(self, *_: Any) -> None:
        if self.state.calls:
            self.state.calls.pop()


def _before_filling(ids: Tensor, filler: int | None) -> Tensor:
    """Everything up to the last token that is no filling; the first one always, with which some models begin."""
    told: Tensor = ids != filler
    last = told.flip(1).long().cummax(1).values.flip(1).bool()
    last[:, 0] = True
    return last


def _shape(given: Mapping[str, Any], ids: str, embedded: str) -> tuple[int, ...]:
    found = given.get(ids) if given.get(embedded) is None else given[embedded]
    return tuple(found.shape[:2]) if isinstance(found, Tensor) and found.dim() > 1 else ()


def _plain(mask: Any, shape: tuple[int, ...]) -> Callable[[], Tensor | None] | None:
    """A mask `[rows, tokens]`; one of something else, such as samples of sound, stays as it is and fits nothing."""
    if not isinstance(mask, Tensor):
        return None
    tokens = shape[1] if len(shape) > 1 and mask.dim() == 2 else mask.shape[-1]
    return lambda: mask[..., -tokens:].bool()
