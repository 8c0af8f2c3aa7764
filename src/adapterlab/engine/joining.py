"""May a method join a model: its name, and how the model is spread over devices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from adapterlab.core.method import Method
from adapterlab.errors import AttachError
from adapterlab.foreign.sharding import is_replicated, is_sharded


def check_may_join(model: nn.Module, there: Mapping[str, Method], method: Any, name: str) -> None:
    """Check that a method can be attached under a name.

    Args:
        model: the base.
        there: methods that are attached already, by name.
        method: what to attach.
        name: of the adapter.

    Raises:
        AttachError: it is no method, the name is malformed or taken, or what joins the model would not be kept alike on
            its devices.
    """
    if not isinstance(method, Method):
        raise AttachError(f"attach needs a method such as al.LoRA(r=16), and received {method!r}.")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
        raise AttachError(f"An adapter's name has letters, digits, '_' and '-' only; received {name!r}.")
    if name in there:
        raise AttachError(
            f"The model has an adapter {name!r} already ({there[name].id}). Choose another name, or "
            f"host.detach({name!r}) first. Attached: {', '.join(there)}."
        )
    if is_sharded(model):
        # Sharding replaces the parameters: what is attached afterwards is split nowhere, and no optimizer knows it.
        raise AttachError(
            f"The model is split among processes already, so {name!r} ({method.id}) cannot join it. Attach, then "
            "shard, then build the optimizer: load the model again and attach before fully_shard or "
            "accelerator.prepare."
        )
    if is_replicated(model):
        raise AttachError(
            f"{type(model).__name__} holds the model already and knows no tensors that join it later: "
            f"{name!r} ({method.id}) would not be kept alike on all devices. Attach to the model inside "
            "(model.module) first, then put it into the wrapper."
        )
