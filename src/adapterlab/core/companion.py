"""Caches of other networks that travel with a model's own key-value cache.

A side network, or a second model that steers the first, needs a cache of its own during generation. It is kept in the
model's cache as one more layer, so that whatever is done to that one (rows reordered by beam search, tokens cropped, a
copy made) is done to both, and it dies with it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DummyLayer

from adapterlab.errors import AttachError


class Companion(DummyLayer):  # type: ignore[misc]
    """A layer of a key-value cache that no layer of the model uses: it holds the cache of another network.

    Attributes:
        key: who put it there.
        cache: of the other network.
    """

    def __init__(self, key: str, cache: Any):
        super().__init__()
        self.key, self.cache = key, cache

    def reset(self) -> None:
        self.cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        self.cache.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cache.batch_select_indices(indices)


def companion(cache: Any, key: str) -> Any:
    """Return the cache that was put into a model's cache under this key, or None at the start of a sequence.

    Args:
        cache: what the model received as `past_key_values`, or None.
        key: of the adapter.

    Raises:
        AttachError: the cache holds tokens that the companion has not seen.
    """
    if cache is None:
        return None
    found = [layer.cache for layer in _layers(cache) if isinstance(layer, Companion) and layer.key == key]
    held = found[0] if found else None
    seen, length = (0 if held is None else int(held.get_seq_length())), int(cache.get_seq_length())
    if seen != length:
        raise AttachError(
            f"The key-value cache holds {length} tokens, of which adapter {key!r} has seen {seen}: it was filled while "
            "the adapter was not live. Start again with an empty cache."
        )
    return held


def accompany(cache: Any, key: str, other: Any) -> None:
    """Put another network's cache into a model's cache, which has run and has all its layers."""
    _layers(cache).append(Companion(key, other))


def _layers(cache: Any) -> list[Any]:
    """Layers of a cache; of an encoder-decoder's, those of the self-attention."""
    layers: list[Any] = getattr(cache, "self_attention_cache", cache).layers
    return layers
