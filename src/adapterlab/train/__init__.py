"""Training: configurations, the loop, exact resume, proof of training.

    config, provenance = load_config("run.yaml", ["training.lr=1e-4"])
    result = fit(config)

Names are imported on first use: `TrainConfig` alone loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

# public name -> module that defines it
_PUBLIC = {
    "TrainConfig": "config",
    "Training": "config",
    "load_config": "config",
    "fit": "run",
    "RunResult": "run",
    "train": "loop",
    "Loop": "loop",
    "Listener": "loop",
    "Status": "loop",
    "Interrupted": "signals",
    "AdapterlabCallback": "hf_callback",
    "hf_trainable": "hf_callback",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'adapterlab.train' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"adapterlab.train.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
