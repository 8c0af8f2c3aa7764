"""Reading folders that others made: nothing of theirs runs, and nothing is built larger than their files.

The only place that calls `from_pretrained` and `from_config` of transformers' automatic classes. Left without a word on
`trust_remote_code` these ask on standard input whether code of the folder may run, so it is always said here.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adapterlab.errors import AdapterlabError, ModelError
from adapterlab.foreign.model import is_encoder_decoder

_COUNTS = {"layer", "layers", "block", "blocks", "depth", "depths", "experts", "head", "heads", "labels"}
_MOST = 1024  # of anything that is counted, where the files hold fewer tensors than that
_PER_BYTE = 8  # weights that a byte of a file can hold: none are packed into less than a bit
_ALWAYS = 1 << 24  # numbers that any model may have beside its weights, such as masks and tables of angles


def read_config(where: str | Path, *, trust_remote_code: bool, revision: str | None = None) -> PretrainedConfig:
    """Read the configuration of a model.

    Args:
        where: a folder, or a repository of the hub.
        trust_remote_code: whether code that lies beside it may run.
        revision: branch, tag or commit of a repository.

    Raises:
        ModelError: it needs code that may not run, or counts that no model has.
        OSError, ValueError, KeyError, TypeError: it cannot be read.
    """
    place = _place(where, revision)
    with _named(where):
        plain, _ = PretrainedConfig.get_config_dict(where, **place)
        _check_counts(where, plain, trust_remote_code)
        found: PretrainedConfig = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **place)
    return found


def read_tokenizer(folder: Path, config: PretrainedConfig, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model.

    Args:
        folder: of the model.
        config: of the model, read before: transformers would read it without looking at its numbers.
        trust_remote_code: whether code that lies in the folder may run.

    Raises:
        ModelError: it needs code that may not run.
        OSError, ValueError, KeyError, TypeError: it cannot be read.
    """
    with _named(folder):
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=trust_remote_code, local_files_only=True
        )
    return found


def build(config: PretrainedConfig, *, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """Make the language model of a configuration, with the weights it starts with.

    Raises:
        ModelError: it needs code that may not run.
    """
    with _named(config.name_or_path or type(config).__name__):
        return _kind(config).from_config(config, trust_remote_code=trust_remote_code, **options)  # type: ignore[no-any-return]


def read_model(
    folder: Path, config: PretrainedConfig, *, trust_remote_code: bool, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Read a language model and say which weights were missing or of another shape.

    Raises:
        ModelError: it needs code that may not run, or its configuration asks for more than the files can hold.
        OSError, ValueError, KeyError, SafetensorError: it cannot be read.
    """
    if not trust_remote_code:  # who trusts the code trusts its numbers, and that code may not run without values
        _check_sizes(folder, config)
    with _named(folder):
        # Wrong shapes are let through here: the caller reports them together with what is missing.
        return _kind(config).from_pretrained(  # type: ignore[no-any-return]
            folder, config=config, trust_remote_code=trust_remote_code, local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip


def _kind(config: PretrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def _place(where: str | Path, revision: str | None) -> dict[str, Any]:
    return {"local_files_only": True} if os.path.isdir(where) else {"revision": revision}


@contextlib.contextmanager
def _named(where: str | Path) -> Iterator[None]:
    """Say which setting is meant where code of a folder would have to run, and take any shape of a file for a fault."""
    try:
        yield
    except (OSError, KeyError, TypeError, SafetensorError, AdapterlabError):
        raise
    except Exception as error:  # whatever transformers makes of a shape that it does not know
        if not isinstance(error, ValueError):
            what = " ".join(str(error).split())
            raise ValueError(f"it is not as transformers writes it ({type(error).__name__}: {what})") from error
        if "trust_remote_code" not in str(error):
            raise
        raise ModelError(
            f"{str(where)!r} cannot be used without code of its own (auto_map names it), and nothing that lies in a "
            "model folder runs unless you say so. Read that code; if you trust it, set trust_remote_code=True (on the "
            "command line --trust-remote-code, in a configuration trust_remote_code: true)."
        ) from None


def _check_counts(where: str | Path, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Refuse numbers of layers, experts and the like that the files cannot hold: objects are made for each."""
    most = max(_MOST, sum(1 for _ in _shapes(Path(where))))
    for path, value in _leaves(config):
        key = next(part for part in reversed(path) if isinstance(part, str))
        if isinstance(value, (int, float)) and value > most and key.lower().rpartition("_")[2] in _COUNTS:
            raise ModelError(
                f"config.json of {str(where)!r} says {key}={value!r}, and its files hold tensors for {most:,} at most. "
                "It is damaged, or belongs to other weights."
            )
        if isinstance(value, str) and "/" in value and key.endswith("_implementation") and not trust_remote_code:
            raise ModelError(
                f"config.json of {str(where)!r} says {key}={value!r}: a kernel of the hub, which is code that would "
                "run. Remove the entry, or set trust_remote_code=True (--trust-remote-code) if you trust it."
            )


def _leaves(value: Any, path: tuple[str | int, ...] = ("",)) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _leaves(inner, (*path, i))
    else:
        yield path, value


def _check_sizes(folder: Path, config: PretrainedConfig) -> None:
    """Compare what a configuration asks for with what the weight files can hold, before any memory is taken."""
    held = sum(file.stat().st_size for file in folder.iterdir() if _is_weights(file))
    try:
        with torch.device("meta"):
            model = build(config, trust_remote_code=False)
    except (RuntimeError, OverflowError, MemoryError, ZeroDivisionError) as error:
        raise ModelError(f"No model can be made of config.json in {str(folder)!r}: {error}") from None
    asked = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if asked > _PER_BYTE * held + _ALWAYS:
        raise ModelError(
            f"config.json in {str(folder)!r} describes a model of {asked:,} numbers, and its weight files have "
            f"{held:,} bytes.{_first_difference(folder, model)} They do not belong together: copy both again."
        )


def _first_difference(folder: Path, model: PreTrainedModel) -> str:
    asked = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in _shapes(folder):
        if asked.get(name, shape) != shape:
            return f" For example {name} is {list(shape)} there and would be {list(asked[name])}."
    return ""


def _is_weights(file: Path) -> bool:
    return file.is_file() and bool(re.search(r"\.(safetensors|bin)$", file.name))


def _shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the headers of the weight files, which are read without the weights."""
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with contextlib.suppress(SafetensorError, OSError), safe_open(file, "pt") as header:
            for name in header.keys():  # noqa: SIM118 (it is no mapping)
                yield name, tuple(header.get_slice(name).get_shape())
