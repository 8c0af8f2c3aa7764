"""Where a model comes from: the protocol, and the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.progress import Progress

from adapterlab.errors import ModelError
from adapterlab.models.folder import WEIGHTS, missing_files
from adapterlab.models.store import hashes

# Weights in one format, and the small files beside them; sub-folders hold other formats of the same weights.
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
_UNWANTED = ["*/*", "consolidated*"]


class Source(Protocol):
    """A way to get a model."""

    @property
    def repo(self) -> str:
        """Id of the model on the hub, wherever it is fetched from."""

    @property
    def sha256(self) -> str | None:
        """Checksum of the download, where one is known beforehand."""

    def present(self, folder: Path) -> Path | None:
        """Find a complete copy on disk by names and sizes, without network and without hashing."""

    def fetch(self, folder: Path, progress: Progress, *, force: bool = False) -> Path:
        """Get the model, whole or not at all.

        Args:
            folder: where to put it, unless the source keeps its own cache.
            progress: the display.
            force: fetch again even when it is there.

        Returns:
            The folder it lies in.
        """

    def damaged(self, where: Path, progress: Progress) -> list[str]:
        """Hash every file of a copy and name those that differ from what was fetched."""


@dataclass(frozen=True)
class Hub:
    """A repository of the Hugging Face hub, kept in the hub client's own cache.

    Attributes:
        repo: `org/name`.
        revision: branch, tag or commit; None for the default branch.
    """

    repo: str
    revision: str | None = None
    sha256: str | None = None

    def present(self, folder: Path) -> Path | None:
        """Look into the hub client's cache."""
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(self.repo, "config.json", revision=self.revision)
        where = Path(config).parent if isinstance(config, str) else None
        return where if where and not missing_files(where) else None

    def fetch(self, folder: Path, progress: Progress, *, force: bool = False) -> Path:
        """Download what is not in the cache yet; without a connection a complete cached copy is enough."""
        from huggingface_hub import snapshot_download

        try:
            where = Path(
                snapshot_download(
                    self.repo,
                    revision=self.revision,
                    allow_patterns=_WANTED,
                    ignore_patterns=_UNWANTED,
                    force_download=force,
                )
            )
        except Exception as error:  # the hub client's errors, and its HTTP library's, have no common base class
            raise ModelError(
                f"{self.repo!r} could not be fetched from the hub: {type(error).__name__}: {str(error).strip()}"
            ) from error
        if missing := missing_files(where):
            raise ModelError(
                f"{self.repo!r} came from the hub without {', '.join(missing)}. adapterlab needs config.json and "
                f"weights ({', '.join(WEIGHTS)}); repositories with other weight formats are not read."
            )
        return where

    def damaged(self, where: Path, progress: Progress) -> list[str]:
        """Check the large files: the cache names each one's content by its sha256."""
        blobs = {path.name: path.resolve() for path in where.iterdir() if path.is_file()}
        hashed = {name: blob for name, blob in blobs.items() if re.fullmatch(r"[0-9a-f]{64}", blob.name)}
        found = hashes(hashed.values(), "Verifying", progress)
        return [name for name, digest in zip(hashed, found, strict=True) if digest != hashed[name].name]
