"""Facts of AdapterHub's library: for which models it has places of its own, and how it calls them."""

from __future__ import annotations

from typing import Any

from torch import nn

from adapterlab.errors import FormatError
from adapterlab.foreign.model import config_of

# Types of models on which its adapters were compared with those here. Others have further places and other names.
MODEL_TYPES = ("bert", "roberta", "gpt2", "llama", "t5")

# Options of its LoRA -> role of the feed-forward projections they speak of. Its Llama has the two exchanged.
_FEED_FORWARD = {"intermediate_lora": "up", "output_lora": "down"}
_EXCHANGED = ("llama",)


def check_known(model: Any) -> str:
    """Return the type of a model whose places are known.

    Raises:
        FormatError: they are not.
    """
    found = str(getattr(config_of(model), "model_type", None))
    if found not in MODEL_TYPES:
        raise FormatError(
            f"AdapterHub's adapters of models of the type {found!r} were not compared with those here, so they are not "
            f"exchanged. Known are: {', '.join(MODEL_TYPES)}. Use our own form, or HF PEFT's."
        )
    return found


def feed_forward_roles(model: Any) -> dict[str, str]:
    """Return which feed-forward projections the options of its LoRA speak of: option -> role."""
    roles = dict(_FEED_FORWARD)
    if check_known(model) in _EXCHANGED:
        roles = dict(zip(roles, reversed(roles.values()), strict=True))
    return roles


def holder(model: nn.Module, path: str, block: str, attention: bool) -> str:
    """Return where it keeps the bottleneck adapter of a sublayer.

    That is the module around the sublayer that has its norm, as in BERT and T5, else the block itself.

    Args:
        model: which.
        path: of the sublayer or of a projection or norm in it.
        block: path of its layer.
        attention: whether it is an attention sublayer.
    """
    inner = path.rpartition(".")[0]
    while len(inner) > len(block):
        children = model.get_submodule(inner).named_children()
        if any("norm" in type(child).__name__.lower() for _, child in children):
            return f"{inner}.adapters"
        inner = inner.rpartition(".")[0]
    return f"{block}.{'attention' if attention else 'output'}_adapters.adapters"
