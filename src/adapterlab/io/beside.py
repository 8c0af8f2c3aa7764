"""What trains in a model without being an adapter's: a head around the part that was attached to, a table made anew.

Attaching freezes what it attaches to. Whoever trains the rest of a larger model expects that saving keeps that too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adapterlab.core.codec import PREFIX
from adapterlab.engine.attachments import Attachments
from adapterlab.errors import OutputError
from adapterlab.foreign.model import base_modules, is_adapter_path
from adapterlab.foreign.sharding import whole


def trained_beside(host: Attachments) -> dict[str, nn.Module]:
    """Return modules of the base that train without being any adapter's: a head around what was attached to.

    Raises:
        OutputError: such a parameter is held by a module with others inside, of which no copy can be saved.
    """
    owned = {path for held in host.patches.values() for path in held}
    found = {}
    for path, parameter in host.base_parameters().items():
        if parameter.requires_grad and path not in owned:
            place = path.rpartition(".")[0]
            found[place] = host.module(place)
            if any(module is not found[place] for _, module in base_modules(found[place])):
                raise OutputError(
                    f"{path} trains and belongs to no adapter, so an adapter folder would lose it. Freeze it with "
                    "requires_grad_(False), or train it with a method for parameters, such as a part of the base."
                )
    return found


def add_beside(
    host: Attachments, name: str, config: dict[str, Any] | None, info: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Add modules that train beside an adapter as its `modules_to_save`, which they are for whoever loads it.

    Of several adapters the first live one takes them.
    """
    beside = trained_beside(host) if name == next(iter(host.active), name) else {}
    if not beside:
        return
    info["fields"]["modules_to_save"] = [*info["fields"]["modules_to_save"], *beside]
    info["modules"] += list(beside)
    if config is not None:
        config["modules_to_save"] = [*(config["modules_to_save"] or ()), *beside]
    for path, module in beside.items():
        for leaf, value in module.state_dict().items():
            if not is_adapter_path(leaf):
                tensors[f"adapter.{path}.copy.{leaf}" if config is None else f"{PREFIX}{path}.{leaf}"] = whole(value)
