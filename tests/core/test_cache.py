"""Key-value caches under every name, and masks that `generate` has expanded for static ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, StaticCache

from adapterlab.errors import AttachError
from adapterlab.foreign.cache import (
    NAMES,
    Companion,
    accompany,
    cache_argument,
    cache_in,
    cache_out,
    companion,
    make_room,
    plain_mask,
    twin,
    with_cache,
    without_cache,
)

CONFIG = LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)


def forward_with(name: str) -> Any:
    space: dict[str, Any] = {}
    exec(f"def forward(self, x, {name}=None): return x", space)
    return type("Model", (nn.Module,), {"forward": space["forward"]})()


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_found_under_every_name(name: str) -> None:
    assert cache_argument(forward_with(name)) == name
    assert cache_in({"x": 1, name: "held"}) == cache_out({name: "held"}) == "held"
    assert without_cache({"x": 1, name: "held"}) == {"x": 1}
    assert with_cache({"x": 1, name: "held"}, "other") == {"x": 1, name: "other"}
    assert with_cache({"x": 1, name: None}, "other") == {"x": 1, name: None}
    assert cache_argument(nn.Linear(2, 2)) is None


def filled(tokens: int) -> DynamicCache:
    cache = DynamicCache(config=CONFIG)
    for layer in range(2):
        cache.update(torch.zeros(2, 2, tokens, 4), torch.zeros(2, 2, tokens, 4), layer)
    return cache


def test_a_note_says_that_an_adapter_saw_the_tokens() -> None:
    cache = filled(5)
    with pytest.raises(AttachError, match=r"holds 5 tokens, of which adapter 'a' has seen 0"):
        companion(cache, "a")
    accompany(cache, "a", mask=torch.tensor([[0, 1], [1, 1]]))
    accompany(cache, "a", mask=torch.tensor([[0, 1], [1, 0]]))  # a second sequence in the same cache
    note = companion(cache, "a")
    assert isinstance(note, Companion)
    assert sum(isinstance(layer, Companion) for layer in cache.layers) == 1
    cache.reorder_cache(torch.tensor([1, 1]))
    assert note.mask is not None
    assert note.mask.tolist() == [[1, 0], [1, 0]]
    assert companion(None, "a") is companion(DynamicCache(config=CONFIG), "a") is None


def test_a_twin_is_of_the_same_kind_and_has_no_notes() -> None:
    cache = filled(5)
    accompany(cache, "a", filled(5))
    cache.reset()
    assert [type(layer) for layer in twin(cache).layers] == [type(layer) for layer in filled(1).layers]
    assert isinstance(cache.layers[-1], Companion)
    static = StaticCache(config=CONFIG, max_cache_len=10)
    other = twin(static)
    other.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert int(other.get_seq_length()) == 3
    assert not any(layer.is_initialized for layer in static.layers)
    assert other.layers[1].max_cache_len == 10


def test_static_caches_grow_while_they_are_empty() -> None:
    cache = StaticCache(config=CONFIG, max_cache_len=10)
    make_room(cache, 4, CONFIG)
    assert {layer.max_cache_len for layer in cache.layers} == {14}
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), layer)
    make_room(cache, 4, CONFIG)
    assert {layer.max_cache_len for layer in cache.layers} == {14}


def expanded(plain: torch.Tensor, window: int, columns: int) -> torch.Tensor:
    """What `generate` makes of a mask: `[rows, 1, tokens, columns]`."""
    tokens = plain.shape[1]
    at, keys = torch.arange(tokens)[:, None], torch.arange(columns)
    wide = torch.cat([plain.bool(), torch.zeros(len(plain), columns - tokens, dtype=torch.bool)], 1)
    return (wide[:, None] & (keys <= at) & (keys > at - window))[:, None]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("additive", [False, True])
def test_the_plain_mask_is_read_back(window: int | None, additive: bool) -> None:
    plain = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask: Any = expanded(plain, window or 5, 9)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    config = LlamaConfig()
    config.sliding_window = window
    given = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": mask}
    found = plain_mask(given, config)
    assert found is not None
    assert torch.equal(found, plain)
    by_kind = {**given, "attention_mask": {"full_attention": expanded(plain, 5, 9), "sliding_attention": None}}
    assert torch.equal(plain_mask(by_kind, config), plain)  # type: ignore[arg-type]
    assert plain_mask({**given, "attention_mask": {"full_attention": None}}, config) is None
    assert plain_mask({**given, "attention_mask": plain}, config) is plain


def test_a_mask_of_another_kind_is_refused() -> None:
    both_ways = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    given = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": both_ways}
    with pytest.raises(AttachError, match="no causal mask of whole tokens"):
        plain_mask(given, LlamaConfig())
