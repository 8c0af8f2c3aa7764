"""Reading files that may come from anybody: objects in JSON, and tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from adapterlab.errors import FormatError
from adapterlab.io.finite import not_finite
from adapterlab.json_text import parsed

_AT_ONCE = 1 << 26  # bytes up to which a file is read as a whole: faster, and in memory twice for a moment


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        FormatError: it does not.
    """
    try:
        found = parsed(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{file} cannot be read as JSON ({error}). Copy it again, or save the adapter again."
        ) from None
    if not isinstance(found, dict):
        raise FormatError(f"{file} should hold a JSON object and holds {type(found).__name__}.")
    return found


def contents(file: Path) -> bytes | None:
    """Read a file that is not large; None: it is.

    Raises:
        FormatError: it cannot be read.
    """
    try:
        return file.read_bytes() if file.stat().st_size <= _AT_ONCE else None
    except OSError as error:
        raise _damaged(file, error) from None


def read_tensors(file: Path, data: bytes | None = None) -> dict[str, Tensor]:
    """Read a file of tensors.

    Args:
        file: of tensors.
        data: its contents, if they were read.

    Raises:
        FormatError: it is damaged, or holds values that are not finite.
    """
    try:
        tensors = load_file(file) if data is None else load(data)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(file, error) from None
    if (key := not_finite(tensors)) is not None:
        raise FormatError(
            f"{file} holds values that are not finite, first in {key}: such an adapter answers nothing. Its training "
            "went wrong; take an earlier checkpoint, or train again with a lower learning rate."
        )
    return tensors


def _damaged(file: Path, error: Exception) -> FormatError:
    return FormatError(f"{file} is damaged ({error}). Copy it again, or save the adapter again.")


def check_there(file: Path) -> None:
    """Require a file of tensors.

    Raises:
        FormatError: there is none, or a pickle in its place.
    """
    if file.is_file():
        return
    folder, name = file.parent, file.name
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    if not pickled:
        raise FormatError(f"{folder} has no {name}. Copy the whole folder, or save the adapter again.")
    raise FormatError(
        f"{folder} has its tensors in {pickled[0]}, a pickle: opening one may run whatever its author put into it, so "
        f"none is opened here. Ask for the adapter as {name}, which newer versions write. Or convert it, letting "
        "torch take tensors and nothing else out of it; in that folder:\n"
        f"  python -c \"import torch; from safetensors.torch import save_file; t = torch.load('{pickled[0]}', "
        f"map_location='cpu', weights_only=True); save_file({{k: v.clone() for k, v in t.items()}}, '{name}')\""
    )
