"""Load a base model and its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from adapterlab.errors import ConfigError, ModelError, nearest, require
from adapterlab.foreign.model import name_base
from adapterlab.foreign.pretrained import read_config, read_model, read_tokenizer
from adapterlab.foreign.quantized import misread
from adapterlab.models.catalogue import DEFAULT, catalogue, public_name
from adapterlab.models.progress import quiet_transformers
from adapterlab.models.pulling import resolve
from adapterlab.paths import user_path

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZATIONS = ("nf4", "int8")
_COMMIT = re.compile("[0-9a-f]{40}")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


def load_model(
    name: str | Path = DEFAULT,
    *,
    precision: str = "bf16",
    device: str | torch.device | None = None,
    quantize: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer, fetching them first when they are not on disk.

    A tokenizer without a padding token gets its end token as one: batches need some id to fill short rows with,
    padded positions are masked out of attention and loss, and no new row of the embedding is needed.

    Args:
        name: a local folder, a hub id (`org/name`) or a catalogue alias.
        precision: "fp32", "bf16" or "fp16"; with `quantize`, what the remaining weights and the products are in.
        device: where to put it; by default cuda, else mps, else cpu. "auto" places its layers over all devices, and on
            the CPU what they have no room for (accelerate's `device_map`).
        quantize: None, "nf4" (4 bits) or "int8", through bitsandbytes.
        attn_implementation: one of transformers' attention kernels ("sdpa", "eager", "flash_attention_2", ...).
        revision: branch, tag or commit of a hub repository.
        trust_remote_code: run the code that the model or tokenizer brings; without it, none of theirs runs.

    Returns:
        The model, in eval mode, and the tokenizer. The configuration remembers the hub id, or the folder that was
        given, so that adapters saved from it say which base they belong to.

    Raises:
        ConfigError: a setting is unknown.
        ModelError: the model is unknown, damaged, cannot be fetched, needs code that may not run, or its packed weights
            would be read wrongly here.
    """
    dtype = PRECISIONS.get(precision)
    if dtype is None:
        raise ConfigError(f"precision={precision!r} is unknown. {nearest(precision, PRECISIONS)}")
    everywhere = device == "auto"
    place = _device(None if everywhere else device)
    options = _quantization(quantize, dtype, place) | ({"device_map": "auto"} if everywhere else {})
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    folder = resolve(name, revision)
    with quiet_transformers():
        config = _read_config(folder, trust_remote_code)
        tokenizer = _load_tokenizer(folder, config, trust_remote_code)
        model = _load_weights(folder, config, trust_remote_code, dtype=dtype, **options)
    if quantize is None and not everywhere:
        model.to(place)
    if why := misread(model):
        raise ModelError(f"{name}: {why}")
    known_as = public_name(folder if user_path(name).is_dir() else name)
    name_base(model, known_as, commit=_commit(folder), copy=_copy(folder))
    return model.eval(), tokenizer


def _commit(folder: Path) -> str | None:
    """The commit that a folder of the hub client's cache holds."""
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else None


def _copy(folder: Path) -> str | None:
    """The alias of a copy that the catalogue has from elsewhere, whose numbers may not be the hub's."""
    return next((entry.alias for entry in catalogue().values() if entry.folder == folder), None)


def _device(device: str | torch.device | None) -> torch.device:
    """Check the device asked for, or choose the fastest one there is."""
    there = ["cpu"] + ["mps"] * torch.backends.mps.is_available() + ["cuda"] * torch.cuda.is_available()
    if device is None:
        return torch.device(there[-1])
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is unknown. On this machine there is: {', '.join(there)}.") from error
    if place.type == "meta" or (place.type in ("mps", "cuda") and place.type not in there):
        raise ConfigError(f"device={device!r} is not there. On this machine there is: {', '.join(there)}.")
    return place


def _quantization(quantize: str | None, dtype: torch.dtype, place: torch.device) -> dict[str, Any]:
    """Translate `quantize` into arguments of `from_pretrained`."""
    if quantize is None:
        return {}
    if quantize not in QUANTIZATIONS:
        raise ConfigError(
            f"quantize={quantize!r} is unknown. {nearest(quantize, QUANTIZATIONS)} None keeps all weights as they are."
        )
    require("bitsandbytes", "quantized", f"for quantize={quantize!r}")
    if quantize == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config, "device_map": {"": place}}  # quantized while they are put on the device


def _read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return read_config(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The configuration in {str(folder)!r} cannot be read: {error}") from error


def _load_tokenizer(folder: Path, config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    # Checked here because transformers would make an empty vocabulary of its own.
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ModelError(
            f"{str(folder)!r} has no tokenizer: none of {', '.join(_VOCABULARIES)}. "
            "Save it there with tokenizer.save_pretrained()."
        )
    try:
        tokenizer = read_tokenizer(folder, config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The tokenizer in {str(folder)!r} cannot be read: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_weights(folder: Path, config: PretrainedConfig, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    try:
        model, report = read_model(folder, config, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"The model in {str(folder)!r} cannot be loaded: {error}") from error
    missing = sorted(str(key) for key in report["missing_keys"])
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if missing or mismatched:
        parts = [f"missing keys: {_some(missing)}"] * bool(missing)
        parts += [f"keys of another shape: {_some(mismatched)}"] * bool(mismatched)
        raise ModelError(
            f"The weights in {str(folder)!r} do not fill {type(model).__name__}: {'; '.join(parts)}. They would be "
            "random numbers. Check that config.json and the weights belong together, and that the model was saved "
            "with its language-model head."
        )
    return model


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
