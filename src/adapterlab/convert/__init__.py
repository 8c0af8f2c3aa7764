"""What is made of trained adapters: one of several, a plain model, a LoRA, and figures of what they changed.

    combine(host, ["north", "south"], [0.7, 0.3], how="ties", into="both")
    merge_into_base(host, tokenizer, "merged")
    export_lora(host, "north", energy=0.99, into="north-lora")
    extract_lora(base, tuned, rank=16)
    analyze(AdapterChanges(host, "north")).spectra

Names are imported on first use: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from adapterlab.lazy import lazy

# public name -> module that defines it
_PUBLIC = {
    "AdapterChanges": "changes",
    "Analysis": "analysis",
    "Change": "changes",
    "Conversion": "building",
    "Factors": "low_rank",
    "ModelChanges": "changes",
    "United": "entries",
    "Verification": "verifying",
    "analyze": "analysis",
    "combine": "combining",
    "draw": "picture",
    "export_adapterhub": "extracting",
    "export_peft": "extracting",
    "export_lora": "extracting",
    "extract_lora": "extracting",
    "fit": "low_rank",
    "merge_into_base": "merging",
}

__all__ = [*_PUBLIC]

__getattr__, __dir__ = lazy(__name__, _PUBLIC)
