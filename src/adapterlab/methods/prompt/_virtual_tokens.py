"""What methods with virtual tokens share: words to start from, and PEFT's sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.engine.modes import evaluating
from adapterlab.engine.wrapping import put, take
from adapterlab.errors import ConfigError, FormatError
from adapterlab.foreign.model import input_table, is_encoder_decoder

# Options of PEFT that repeat the sizes of the model.
SIZES = ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
PROMPT = "prompt_embeddings"
FREQUENT = 5000  # vocabularies list frequent tokens first


def peft_sizes(submodules: int, token_dim: int, heads: int, layers: int) -> dict[str, int]:
    """Return the options of SIZES."""
    return {
        "num_transformer_submodules": submodules,
        "token_dim": token_dim,
        "num_attention_heads": heads,
        "num_layers": layers,
    }


def token_table(host: Carrier) -> nn.Module | None:
    """Return the embedding of the input tokens, or None for a model that reads no tokens."""
    table = input_table(host.model)
    return table if isinstance(table, nn.Embedding) else None


def reads_tokens(host: Carrier) -> bool:
    """Say whether a model is called with tokens: one that reads sound may have a table of those it writes."""
    return "input_ids" in host.site(host.backbone).arguments


def word_ids(host: Carrier, words: Sequence[int], length: int) -> Tensor | None:
    """Return token ids `[length]`: the words, cut or tiled, or without words a draw from the frequent tokens.

    Returns:
        None for a model that reads no tokens.

    Raises:
        ConfigError: an id is not in the vocabulary, or there are words and the model reads none.
    """
    table: Any = token_table(host)
    if table is None or not reads_tokens(host):
        if words:
            raise ConfigError(f"{type(host.model).__name__} reads no tokens, so a prompt cannot start from words.")
        return None
    check_words(host, words)
    device, size = table.weight.device, table.num_embeddings
    if words:
        return torch.tensor(words, device=device).repeat(-(-length // len(words)))[:length]
    pool = torch.randperm(min(size, FREQUENT))
    return pool.repeat(-(-length // len(pool)))[:length].to(device)


def check_words(host: Carrier, words: Sequence[int]) -> None:
    """Check that a model knows tokens.

    Raises:
        ConfigError: an id is not in the vocabulary.
    """
    size: Any = getattr(token_table(host), "num_embeddings", 0)
    if wrong := [i for i in words if not 0 <= i < size]:
        raise ConfigError(f"words: token id {wrong[0]} is not in the vocabulary of {size} tokens.")


def peft_prompt(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return PEFT's one tensor.

    Raises:
        FormatError: it is missing.
    """
    if PROMPT not in tensors:
        raise FormatError(
            f"The file of a PEFT prompt holds one tensor {PROMPT!r}, and this one has: "
            f"{', '.join(list(tensors)[:5]) or 'none'}. Save the adapter again with PEFT."
        )
    return tensors[PROMPT]


class _Recorder(Adapter):
    """Keeps the keys and values that an attention module computes."""

    place = "attention"
    kept: ClassVar[Any]

    def around(self, run: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["kept"] = (k, v)
        return run(q, k, v, *args, **kwargs)


def recorded_keys_and_values(host: Carrier, modules: Sequence[nn.Module], ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Run the plain model on tokens and return the keys and values `[1, n_kv, tokens, hd]` of attention modules.

    Args:
        host: of the model.
        modules: attention modules that are reached by `Host.attend` already.
        ids: `[tokens]`.
    """
    key = "_recorder"
    recorders = [_Recorder(host.site(module)) for module in modules]
    inputs = {"input_ids": ids[None]}
    if is_encoder_decoder(host.model):
        inputs["decoder_input_ids"] = ids[None]
    for module, recorder in zip(modules, recorders, strict=True):
        put(module, key, recorder, host.state)
    active, host.state.active = host.state.active, (key,)
    try:
        with evaluating(host.model):
            host.backbone(**inputs, use_cache=False)
    finally:
        host.state.active = active
        for module in modules:
            take(module, key)
    return [recorder.__dict__["kept"] for recorder in recorders]
