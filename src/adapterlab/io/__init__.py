"""Adapter folders: ours, and HF PEFT's two files; writes are atomic.

Names are imported on first use: writing a file loads no torch.
"""

from __future__ import annotations

from adapterlab.lazy import lazy

# public name -> module that defines it
_PUBLIC = {
    "AdapterInfo": "info",
    "read_info": "folder",
    "save": "folder",
}

__all__ = [*_PUBLIC]

__getattr__, __dir__ = lazy(__name__, _PUBLIC)
