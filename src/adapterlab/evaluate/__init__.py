"""Use and judge trained adapters: generation, exact loss, scores with intervals.

    result = score("runs/sums", base=True)
    print(result.score, result.interval, result.fixed, result.broken)

Names are imported on first use: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from adapterlab.lazy import lazy

# public name -> module that defines it
_PUBLIC = {
    "Evaluation": "result",
    "Figures": "result",
    "Opened": "opening",
    "Place": "opening",
    "chat_ids": "generation",
    "evaluate_loss": "loss",
    "generate": "generation",
    "locate": "opening",
    "open_target": "opening",
    "score": "scoring",
    "stop_ids": "generation",
    "stream": "generation",
    "window_of": "generation",
}

__all__ = [*_PUBLIC]

__getattr__, __dir__ = lazy(__name__, _PUBLIC)
