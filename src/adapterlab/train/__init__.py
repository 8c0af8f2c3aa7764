"""Training: configurations, the loop, exact resume, proof of training.

    config, provenance = load_config("run.yaml", ["training.lr=1e-4"])
    result = fit(config)

Names are imported on first use: `TrainConfig` alone loads neither torch nor transformers.
"""

from __future__ import annotations

from adapterlab.lazy import lazy

# public name -> module that defines it
_PUBLIC = {
    "TrainConfig": "config",
    "Training": "config",
    "load_config": "config",
    "fit": "run",
    "fit_many": "many",
    "RunResult": "result",
    "train": "loop",
    "train_together": "together",
    "Entrant": "together",
    "Ending": "together",
    "Loop": "loop",
    "Listener": "loop",
    "Status": "loop",
    "Interrupted": "signals",
    "AdapterlabCallback": "hf_callback",
    "hf_trainable": "hf_callback",
    "reference_model": "reference",
}

__all__ = [*_PUBLIC]

__getattr__, __dir__ = lazy(__name__, _PUBLIC)
