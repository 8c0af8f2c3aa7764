"""What is made of trained adapters: one of several, a plain model, a LoRA of any linear change, and what they look like.

    combine(host, ["north", "south"], [0.7, 0.3], how="ties", into="both")
    merge_into_base(host, tokenizer, "merged")
    export_lora(host, "north", energy=0.99, into="north-lora")
    extract_lora(base, tuned, rank=16)
    analyze(AdapterChanges(host, "north")).spectra

Names are imported on first use: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

# public name -> module that defines it
_PUBLIC = {
    "AdapterChanges": "changes",
    "Analysis": "analyze",
    "Change": "changes",
    "Conversion": "building",
    "Factors": "low_rank",
    "ModelChanges": "changes",
    "Verification": "verifying",
    "analyze": "analyze",
    "combine": "combine",
    "draw": "picture",
    "export_lora": "extract",
    "extract_lora": "extract",
    "fit": "low_rank",
    "merge_into_base": "merging",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'adapterlab.convert' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"adapterlab.convert.{_PUBLIC[name]}"), name)
    globals()[name] = value  # also where a submodule of the same name has just been put here by the import
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
