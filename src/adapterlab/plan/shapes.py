"""Shapes of common models, known without network; local folders and hub ids otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab.errors import ModelError, nearest
from adapterlab.foreign.model import text_config
from adapterlab.paths import user_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# model_type, then by name: hidden, inner, layers, heads, key-value heads, vocabulary, and what differs from the family.
_HEAD = {"head_dim": 128}
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_FAMILIES: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "llama": (
        {**_UNTIED, "max_position_embeddings": 131072},
        {
            "smollm2-135m": (576, 1536, 30, 9, 3, 49152, {**_TIED, "max_position_embeddings": 8192}),
            "smollm2-360m": (960, 2560, 32, 15, 5, 49152, {**_TIED, "max_position_embeddings": 8192}),
            "smollm2-1.7b": (2048, 8192, 24, 32, 32, 49152, {**_TIED, "max_position_embeddings": 8192}),
            "llama2-7b": (4096, 11008, 32, 32, 32, 32000, {"max_position_embeddings": 4096}),
            "llama2-13b": (5120, 13824, 40, 40, 40, 32000, {"max_position_embeddings": 4096}),
            "llama2-70b": (8192, 28672, 80, 64, 8, 32000, {"max_position_embeddings": 4096}),
            "llama3-8b": (4096, 14336, 32, 32, 8, 128256, {"max_position_embeddings": 8192}),
            "llama3.1-8b": (4096, 14336, 32, 32, 8, 128256),
            "llama3.1-70b": (8192, 28672, 80, 64, 8, 128256),
            "llama3.1-405b": (16384, 53248, 126, 128, 8, 128256),
            "llama3.2-1b": (2048, 8192, 16, 32, 8, 128256, {**_TIED, "head_dim": 64}),
            "llama3.2-3b": (3072, 8192, 28, 24, 8, 128256, {**_TIED, **_HEAD}),
            "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32000, {"max_position_embeddings": 2048}),
        },
    ),
    "qwen2": (
        {**_UNTIED, "max_position_embeddings": 32768},
        {
            "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, _TIED),
            "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, _TIED),
            "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, _TIED),
            "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
            "qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064),
            "qwen2.5-32b": (5120, 27648, 64, 40, 8, 152064),
            "qwen2.5-72b": (8192, 29568, 80, 64, 8, 152064),
        },
    ),
    "qwen3": (
        {**_UNTIED, **_HEAD, "max_position_embeddings": 40960},
        {
            "qwen3-0.6b": (1024, 3072, 28, 16, 8, 151936, _TIED),
            "qwen3-1.7b": (2048, 6144, 28, 16, 8, 151936, _TIED),
            "qwen3-4b": (2560, 9728, 36, 32, 8, 151936, _TIED),
            "qwen3-8b": (4096, 12288, 36, 32, 8, 151936),
            "qwen3-14b": (5120, 17408, 40, 40, 8, 151936),
            "qwen3-32b": (5120, 25600, 64, 64, 8, 151936),
        },
    ),
    "mistral": (
        {**_UNTIED, "sliding_window": None, "max_position_embeddings": 32768},
        {
            "mistral-7b-v0.1": (4096, 14336, 32, 32, 8, 32000, {"sliding_window": 4096}),
            "mistral-7b": (4096, 14336, 32, 32, 8, 32768),
            "mistral-nemo-12b": (5120, 14336, 40, 32, 8, 131072, {**_HEAD, "max_position_embeddings": 131072}),
            "mistral-small-24b": (5120, 32768, 40, 32, 8, 131072, _HEAD),
        },
    ),
    "gemma": (
        {**_TIED, "head_dim": 256, "max_position_embeddings": 8192},
        {
            "gemma-2b": (2048, 16384, 18, 8, 1, 256000),
            "gemma-7b": (3072, 24576, 28, 16, 16, 256000),
        },
    ),
    "gemma2": (
        {**_TIED, "head_dim": 256, "max_position_embeddings": 8192},
        {
            "gemma2-2b": (2304, 9216, 26, 8, 4, 256000),
            "gemma2-9b": (3584, 14336, 42, 16, 8, 256000),
            "gemma2-27b": (4608, 36864, 46, 32, 16, 256000, {**_HEAD, "query_pre_attn_scalar": 144}),
        },
    ),
    "gemma3_text": (
        {**_TIED, "head_dim": 256, "sliding_window": 1024, "max_position_embeddings": 131072},
        {
            "gemma3-1b": (1152, 6912, 26, 4, 1, 262144, {"sliding_window": 512, "max_position_embeddings": 32768}),
            "gemma3-4b": (2560, 10240, 34, 8, 4, 262208),
            "gemma3-12b": (3840, 15360, 48, 16, 8, 262208),
            "gemma3-27b": (5376, 21504, 62, 32, 16, 262208, {**_HEAD, "query_pre_attn_scalar": 168}),
        },
    ),
    "phi": (
        {**_UNTIED, "max_position_embeddings": 2048},
        {
            "phi-1.5": (2048, 8192, 24, 32, 32, 51200, {"partial_rotary_factor": 0.5}),
            "phi-2": (2560, 10240, 32, 32, 32, 51200, {"partial_rotary_factor": 0.4}),
        },
    ),
    "phi3": (
        {**_UNTIED, "sliding_window": None, "pad_token_id": 0, "max_position_embeddings": 4096},
        {
            "phi-3-mini": (3072, 8192, 32, 32, 32, 32064),
            "phi-3-medium": (5120, 17920, 40, 40, 10, 32064),
            "phi-4": (5120, 17920, 40, 40, 10, 100352, {"max_position_embeddings": 16384}),
            "phi-4-mini": (
                3072, 8192, 32, 24, 8, 200064,
                {**_TIED, "partial_rotary_factor": 0.75, "max_position_embeddings": 131072},
            ),
        },
    ),
}  # fmt: skip
_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
_SUFFIXES = r"-(instruct|chat|base|it|hf|4k|v0\.[23]|preview)$"


def shapes() -> dict[str, dict[str, Any]]:
    """Return the fields of every known model's configuration by its short name."""
    found = {}
    for kind, (common, members) in _FAMILIES.items():
        for name, values in members.items():
            numbers, own = values[: len(_FIELDS)], values[len(_FIELDS) :]
            sizes = dict(zip(_FIELDS, numbers, strict=True))
            found[name] = {"model_type": kind, **common, **sizes, **(own[0] if own else {})}
    return found


def config_of(
    model: str | Path | PretrainedConfig, revision: str | None = None, *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Return the configuration of a model, without its weights.

    Args:
        model: a known shape ("qwen2.5-7b", also "Qwen2.5-7B-Instruct" or "Qwen/Qwen2.5-7B"), a catalogue alias, a local
            folder, a hub id, or a configuration.
        revision: branch, tag or commit of a hub repository.
        trust_remote_code: run the code that a configuration brings.

    Raises:
        ModelError: it is unknown, cannot be fetched, lacks fields, or needs code that may not run.
    """
    from transformers import PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return _checked(model, type(model).__name__)
    folder = user_path(model)
    if folder.is_dir():
        return _checked(_read(folder, None, trust_remote_code), str(model))
    known = shapes()
    name = short_name(str(model))
    if name in known:
        from transformers import AutoConfig

        fields = dict(known[name])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        return _checked(_read(str(model), revision, trust_remote_code), str(model))
    raise ModelError(
        f"There is no model {str(model)!r}: it is neither a known shape nor a folder. {nearest(name, known)} Or give a "
        "folder with a config.json, or a hub id such as org/name."
    )


def short_name(model: str) -> str:
    """Return a model's name as the catalogue writes it: without organisation, in lower case, without what was tuned."""
    name = model.rpartition("/")[2].lower()
    while (shorter := re.sub(_SUFFIXES, "", name)) != name and name not in shapes():
        name = shorter
    return re.sub(r"^(meta-)?llama-(?=[23])", "llama", re.sub(r"^gemma-(?=[23]-)", "gemma", name))


def _read(where: str | Path, revision: str | None, trust_remote_code: bool) -> PretrainedConfig:
    from adapterlab.foreign.pretrained import read_config

    try:
        return read_config(where, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"The configuration of {str(where)!r} cannot be read: {str(error).splitlines()[0]} Give a folder with a "
            f"complete config.json, or a known shape: {nearest(short_name(str(where)), shapes())}"
        ) from None


def _checked(config: PretrainedConfig, what: str) -> PretrainedConfig:
    """Refuse a configuration of something that is no language model."""
    text = text_config(config)
    lacking = [name for name in ("vocab_size", "hidden_size", "num_hidden_layers") if not getattr(text, name, None)]
    if lacking:
        raise ModelError(
            f"The configuration of {what!r} (model type {config.model_type or 'not given'!r}) has no "
            f"{', '.join(lacking)}. A plan needs the config.json of a language model of transformers."
        )
    return config
