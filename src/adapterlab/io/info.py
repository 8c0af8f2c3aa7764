"""What an adapter folder says about its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class AdapterInfo:
    """What a folder says about its adapter, read without loading tensors.

    Attributes:
        folder: where it lies.
        method: id of the method.
        fields: its settings.
        base_model: name of the model it was made for, or None.
        revision: of that model, or None.
        name: it had when it was saved.
        written_by: `adapterlab`, `peft`, or `adapterhub` for the library `adapters`.
        modules: paths of the adapted modules.
        sha256: of the tensor file when it was saved, or None.
        seal: checksum of what this file says on the tensors' meaning when it was saved, or None.
        copy: alias of the copy of the base that it was made on, where that is not the hub's, or None.
    """

    folder: Path
    method: str
    fields: dict[str, Any]
    base_model: str | None
    revision: str | None
    name: str
    written_by: str
    modules: tuple[str, ...] = ()
    sha256: str | None = None
    seal: str | None = None
    copy: str | None = None
