"""A state of a model into which HF PEFT injected an adapter, loaded into one that has it attached here.

`from_pretrained` of an adapter folder makes such a model, and the trainer of sentence-transformers resumes by loading
its state into the one that trains.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from adapterlab.core.codec import PREFIX
from adapterlab.engine.attachments import attachments
from adapterlab.foreign.model import ADAPTERS
from adapterlab.io import hf_peft

_BASE = (".base_layer.", ".original_module.")


def watch_injected(model: nn.Module) -> None:
    """Let `translate` see every state before it is loaded into a model."""
    ignore_injected(model)
    model.register_load_state_dict_pre_hook(translate)


def ignore_injected(model: nn.Module) -> None:
    """Undo `watch_injected`."""
    hooks: dict[int, Any] = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is translate]:
        del hooks[key]


def translate(model: nn.Module, state: dict[str, Tensor], lead: str, *more: Any) -> None:
    """Give the tensors of such a state the names they have here; any other is left as it is."""
    host = attachments(model)
    if host is None or len(host.methods) != 1 or not any(_BASE[0] in key for key in state):
        return
    name, method = next(iter(host.methods.items()))
    if method.hf is None:
        return
    theirs: dict[str, Tensor] = {}
    for key in [key for key in state if key.startswith(lead)]:
        short = key[len(lead) :]
        inside = next((part for part in _BASE if part in short), None)
        plain = PREFIX + re.sub(r"(\.modules_to_save)?\.default(?=\.|$)", "", short)
        if inside is not None:
            state[lead + short.replace(inside, ".")] = state.pop(key)
        elif method.hf.locate(plain) is not None or ".modules_to_save." in short:
            theirs[plain] = state.pop(key)
    paths = sorted(host.adapters(name), key=len)
    for key, value in hf_peft.read(method, host, name, theirs).items():
        group, _, rest = key.partition(".")
        path = next((p for p in reversed(paths) if rest.startswith(f"{p}.")), None)
        if group == "adapter" and path is not None:
            state[f"{lead}{path}.{ADAPTERS}.{name}.{rest[len(path) + 1 :]}"] = value
        elif group == "base":
            state[lead + rest] = value
