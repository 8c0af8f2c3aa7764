"""Serve one base model and thousands of adapters: scheduler, paged keys and values, adapters by token.

    with Engine(model, tokenizer) as engine:
        engine.register("sums", "runs/sums/best")
        for event in engine.submit(Request(prompt=(1, 2, 3), adapter="sums")): ...

Names are imported on first use: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from adapterlab.lazy import lazy

# public name -> module that defines it
_PUBLIC = {
    "AdapterState": "requests",
    "Answer": "requests",
    "Engine": "engine",
    "EngineSettings": "requests",
    "Event": "requests",
    "Finished": "requests",
    "Handle": "requests",
    "Request": "requests",
    "Sampling": "requests",
    "Statistics": "requests",
    "Token": "requests",
}

__all__ = [*_PUBLIC]

__getattr__, __dir__ = lazy(__name__, _PUBLIC)
