"""JSON: from files of others, and as what plain values are told apart by."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def parsed(text: str, **options: Any) -> Any:
    """Read JSON.

    Args:
        text: to read.
        options: of `json.loads`.

    Raises:
        ValueError: it is none, or is nested deeper than Python reads.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def digest(value: Any) -> str:
    """Hash plain values; the order of keys does not count, and what JSON does not know counts as its text.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
