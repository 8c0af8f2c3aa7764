"""Key-value caches: what a model calls its cache, and what adapters add to it.

A model's argument and output have had three names: `cache` (transformers 5.24 and later), `past_key_values`, and
`cache_params` for state-space models. Whoever looks for one of them by hand takes every cached step for the first one
as soon as the name changes, without a word: ask here.

A side network, or a second model that steers the first, needs a cache of its own during generation. It is kept in the
model's cache as one more layer, so that whatever is done to that one (rows reordered by beam search, tokens cropped, a
copy made) is done to both, and it dies with it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache

from adapterlab.errors import AttachError

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # older releases have no layer that holds nothing; this is what their caches ask of one

    class DummyLayer:  # type: ignore[no-redef]
        """A layer of a cache that holds no keys."""

        is_compileable, is_sliding, is_croppable, supports_early_init = True, False, True, False
        keys = values = None

        def __init__(self) -> None:
            self.is_initialized = True

        def offload(self) -> None:
            """There is nothing to move."""

        def prefetch(self) -> None:
            """There is nothing to move."""

        def get_max_cache_shape(self) -> int:
            """It has no length."""
            return -1


NAMES = ("cache", "past_key_values", "cache_params")  # the newest first


def cache_argument(module: nn.Module) -> str | None:
    """Return what the forward of a module calls its cache, or None where it takes none."""
    cls: Any = type(module)
    return _argument(cls)


@functools.cache
def _argument(cls: Any) -> str | None:
    accepted = inspect.signature(cls.forward).parameters
    return next((name for name in NAMES if name in accepted), None)


def cache_in(given: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a call, by whichever name the caller uses, or None."""
    return next((given[name] for name in NAMES if given.get(name) is not None), None)


def cache_out(output: Mapping[str, Any]) -> Any:
    """Return the cache in what a model returned, or None."""
    found = dict(output.items())  # a look-up in the output itself warns of the older names
    return next((found[name] for name in NAMES if found.get(name) is not None), None)


def without_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call without the cache."""
    return {name: value for name, value in given.items() if name not in NAMES}


def with_cache(given: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Return the arguments of a call with another cache in the place of the one they have."""
    return {name: cache if name in NAMES and value is not None else value for name, value in given.items()}


def twin(cache: Any) -> Any:
    """Return a cache of the same kind and sizes, for a second pass over the same tokens; both are empty."""
    bare = copy.copy(cache)
    bare.layers = [layer for layer in cache.layers if not isinstance(layer, Companion)]
    return copy.deepcopy(bare)


class Companion(DummyLayer):  # type: ignore[misc]
    """A layer of a key-value cache that no layer of the model uses: an adapter's note that it saw the tokens.

    Attributes:
        key: of the adapter.
        cache: of another network that the adapter runs, or None.
        mask: `[batch, tokens]` of the real tokens of the first pass, or None when all may be seen.
    """

    def __init__(self, key: str, cache: Any = None, mask: Tensor | None = None):
        super().__init__()
        self.key, self.cache, self.mask = key, cache, mask

    def reset(self) -> None:
        self._passed("reset")

    def crop(self, tokens_to_remove: int) -> None:
        self._passed("crop", tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._passed("reorder_cache", beam_idx)
        self.mask = self.mask if self.mask is None else self.mask.index_select(0, beam_idx.to(self.mask.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._passed("batch_repeat_interleave", repeats)
        self.mask = self.mask if self.mask is None else self.mask.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._passed("batch_select_indices", indices)
        self.mask = self.mask if self.mask is None else self.mask[indices]

    def _passed(self, what: str, *args: Any) -> None:
        if self.cache is not None:
            getattr(self.cache, what)(*args)


def held_tokens(cache: Any) -> int:
    """Return how many tokens a cache holds, virtual ones included; 0 without a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def companion(cache: Any, key: str) -> Companion | None:
    """Return what an adapter put into a model's cache, or None at the start of a sequence.

    Args:
        cache: what the model received (see `cache_in`), or None.
        key: of the adapter.

    Raises:
        AttachError: the cache holds tokens that the adapter, or the cache it put there, has not seen.
    """
    length = held_tokens(cache)
    if not length:
        return None
    found = next((layer for layer in _layers(cache) if isinstance(layer, Companion) and layer.key == key), None)
    seen = 0 if found is None else length if found.cache is None else held_tokens(found.cache)
    if seen != length:
        raise AttachError(
            f"The key-value cache holds {length} tokens, of which adapter {key!r} has seen {seen}: it was filled while "
            "the adapter was not live. Start again with an empty cache."
        )
    return found


def accompany(cache: Any, key: str, other: Any = None, mask: Tensor | None = None) -> None:
    """Put an adapter's note into a model's cache, which has run and has all its layers.

    A note that an earlier sequence left in the same cache is replaced.

    Args:
        cache: of the model.
        key: of the adapter.
        other: another network's cache.
        mask: of the first pass, from `plain_mask`.
    """
    layers = _layers(cache)
    layers[:] = [layer for layer in layers if not (isinstance(layer, Companion) and layer.key == key)]
    layers.append(Companion(key, other, mask))


def make_room(cache: Any, count: int, config: Any) -> None:
    """Let a static cache that is still empty hold more tokens than it was made for; others grow by themselves.

    Args:
        cache: of a model.
        count: how many more.
        config: of the model.
    """
    if isinstance(cache, StaticCache) and not any(layer.is_initialized for layer in _own(cache)):
        longest = max(layer.max_cache_len for layer in _own(cache))
        cache.layers[:] = [
            *StaticCache(config=config, max_cache_len=longest + count).layers,
            *(layer for layer in cache.layers if isinstance(layer, Companion)),
        ]


def plain_mask(given: Mapping[str, Any], config: Any, note: Companion | None = None, virtual: int = 0) -> Tensor | None:
    """Return the attention mask of a call as `[batch, tokens]`, one being a token that may be seen; None: all may.

    `generate` expands it beforehand for static caches: causally, within a sliding window perhaps, and for a number of
    positions that does not know of virtual tokens.

    Args:
        given: arguments of the call, the cache among them.
        config: of the model.
        note: what the adapter put into the cache.
        virtual: tokens in the cache that the caller's mask does not know of.

    Raises:
        AttachError: the mask is another one than a causal mask of whole tokens.
    """
    mask = given.get("attention_mask")
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return mask
    inputs = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
    rows, tokens = inputs.shape[0], held_tokens(cache_in(given)) - virtual + inputs.shape[1]
    window = getattr(config, "sliding_window", None)
    if isinstance(mask, Mapping):
        window = None if "full_attention" in mask else window
        mask = mask.get("full_attention", next(iter(mask.values())))
        if mask is None:  # so does transformers write a causal mask without a hidden token
            return None
    if isinstance(mask, Tensor) and mask.dim() == 4:
        if window is not None and note is not None:
            # What has left the window cannot be read off. Tokens that came after the first pass are visible.
            ones = torch.ones(rows, tokens, dtype=torch.long, device=mask.device)
            return ones if note.mask is None else torch.cat([note.mask, ones[:, note.mask.shape[1] :]], 1)
        plain = _contracted(mask.expand(rows, -1, -1, -1), tokens, window)
        if plain is not None:
            return plain
    raise AttachError(
        "This adapter changes how many positions there are, or runs a second network, and needs an attention mask "
        f"[batch, tokens]; it received a {type(mask).__name__} {tuple(getattr(mask, 'shape', ()))} that is no causal "
        "mask of whole tokens. Pass the plain mask."
    )


def _contracted(mask: Tensor, tokens: int, window: int | None) -> Tensor | None:
    """The mask `[rows, tokens]` that expands to `[rows, 1, queries, keys]`, if there is one."""
    seen = mask[:, 0, :, :tokens]
    seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    plain = seen.any(1)
    for reach in (tokens, window or tokens):
        if seen.shape[2] == tokens and bool((_expanded(plain, seen.shape[1], reach) == seen).all()):
            return plain.long()
    return None


def _expanded(plain: Tensor, queries: int, window: int) -> Tensor:
    """The causal mask `[rows, queries, tokens]` of the last queries, each seeing the last `window` tokens."""
    ends = torch.arange(plain.shape[1] - queries, plain.shape[1], device=plain.device)[:, None]
    keys = torch.arange(plain.shape[1], device=plain.device)
    return plain[:, None] & ((keys <= ends) & (keys > ends - window))


def _layers(cache: Any) -> list[Any]:
    """Layers of a cache; of an encoder-decoder's, those of the self-attention."""
    layers: list[Any] = getattr(cache, "self_attention_cache", cache).layers
    return layers


def _own(cache: Any) -> list[Any]:
    """Layers of a static cache that hold tokens."""
    return [layer for layer in _layers(cache) if hasattr(layer, "max_cache_len")]
