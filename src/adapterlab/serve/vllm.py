"""Start vLLM with the adapters of a folder, and say which of them it cannot serve."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterlab.errors import AdapterlabError, ConfigError, MissingDependencyError
from adapterlab.io.files import read_json
from adapterlab.models.pulling import resolve

_CONFIG = "adapter_config.json"
_TYPE = "LORA"  # the one type of HF PEFT's that vLLM computes
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that --max-lora-rank takes
_PROGRAM = "vllm"


@dataclass(frozen=True)
class Plan:
    """How vLLM is started.

    Attributes:
        command: program and arguments.
        served: names of the adapters.
        refused: the others, each with the reason.
    """

    command: tuple[str, ...]
    served: tuple[str, ...]
    refused: dict[str, str]


def plan(model: str, adapters: Sequence[tuple[str, Path]], *, host: str, port: int, name: str) -> Plan:
    """Work out the command.

    Args:
        model: the base, by any name that it has here; vLLM gets the folder.
        adapters: names and folders.
        host: to listen on.
        port: to listen on.
        name: of the base, in requests.

    Raises:
        MissingDependencyError: vLLM is not installed.
        ModelError: there is no such base.
    """
    program = shutil.which(_PROGRAM)
    if program is None:
        raise MissingDependencyError(
            "--engine vllm starts the program 'vllm', which is not installed here. Install it as its own pages say, or "
            "leave the option out: adapterlab's engine serves every method, on CPUs too."
        )
    served: dict[str, tuple[Path, int]] = {}
    refused: dict[str, str] = {}
    for one, folder in adapters:
        try:
            served[one] = folder, rank_in(folder)
        except AdapterlabError as error:
            refused[one] = str(error)
    command = [program, "serve", str(resolve(model)), "--host", host, "--port", str(port), "--served-model-name", name]
    if served:
        rank = max(rank for _, rank in served.values())
        command += ["--enable-lora", "--max-lora-rank", str(next(size for size in _RANKS if size >= rank))]
        command += ["--lora-modules", *(f"{one}={folder}" for one, (folder, _) in served.items())]
    return Plan(tuple(command), tuple(served), refused)


def rank_in(folder: Path) -> int:
    """Return the rank of an adapter that vLLM serves.

    Raises:
        ConfigError: it serves none of this kind; all reasons at once.
        FormatError: the folder is damaged.
    """
    if not (folder / _CONFIG).is_file():
        raise ConfigError("it is of a method that HF PEFT has not; adapterlab export may write it as a plain one.")
    config = read_json(folder / _CONFIG)
    if reasons := "; ".join(_reasons(config)):
        raise ConfigError(f"{reasons}; adapterlab export may write it as a plain one.")
    return _rank(config)


def _reasons(config: dict[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != _TYPE:
        yield f"vLLM serves peft_type {_TYPE} alone, and this is {config.get('peft_type')!r}"
    for option in (
        "use_dora",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "alora_invocation_tokens",
    ):
        if config.get(option):
            yield f"vLLM does not know {option}"
    if config.get("bias") not in (None, "none"):
        yield f"vLLM does not know bias={config['bias']!r}"
    if _rank(config) > _RANKS[-1]:
        yield f"rank {_rank(config)} is above vLLM's {_RANKS[-1]}"


def _rank(config: dict[str, Any]) -> int:
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=1)
