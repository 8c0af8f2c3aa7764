"""The usual start: A uniform, B zero."""

from __future__ import annotations

from adapterlab.init._base import Initialiser


class Kaiming(Initialiser):
    """A uniform within ±1/√in and B zero; for embeddings A zero and B standard normal."""
