"""JSON from files of others."""

from __future__ import annotations

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
