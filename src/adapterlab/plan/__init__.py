"""Say what a training step needs, in memory and work, before anything is loaded.

    plan("qwen2.5-1.5b", "lora", batch=4, length=1024).peak

`plan(model, method, *, batch=1, length=1024, precision="bf16", quantize=None, recompute="none", device=None, ...)`
returns a `Plan` with `peak` (bytes of live tensors), `process` (bytes of the whole process), `parts`, `flops` and
`fits(bytes)`. The numbers come from the library's own training loop, run once on tensors without contents.

Names are imported on first use.
"""

from __future__ import annotations

from adapterlab.lazy import lazy

# public name -> module that defines it
_PUBLIC = {
    "Device": "device",
    "Joint": "joint",
    "Plan": "result",
    "Setup": "setup",
    "plan": "planning",
    "plan_all": "planning",
    "plan_config": "planning",
    "plan_serving": "serving",
    "together": "joint",
}

__all__ = [*_PUBLIC]

__getattr__, __dir__ = lazy(__name__, _PUBLIC)
