"""What happens when a state is loaded into a model with adapters, by `load_state_dict`: trainers resume so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from adapterlab.engine.wrapping import HOST
from adapterlab.errors import AttachError
from adapterlab.foreign.model import ADAPTERS, is_adapter_path, plain_path

T = TypeVar("T")


def own_state(host: Any, state: Mapping[str, T]) -> dict[str, T]:
    """Return what of a model's state is the adapters': their tensors, and base parameters that they own whole now."""
    every = [p for held in host.patches.values() for p in held.values()]
    owned = {p.path for p in every if p.live and p.derive is None and p.entries is None}
    return {k: v for k, v in state.items() if (path := plain_path(k)) in owned or is_adapter_path(path)}


def state_loaded(model: nn.Module, found: Any) -> None:
    """Derive again what depends on the tensors that were loaded, and judge what was missing.

    A state of the adapters alone is whole without the base. One of other adapters is refused, also where the loader
    only warns: it would leave the adapter as it was.

    Raises:
        AttachError: the state has tensors of adapters that are not here, or lacks some of an adapter that it has.
    """
    host: Any = model.__dict__.get(HOST)
    if host is None:
        return
    own = list(model.state_dict(keep_vars=True))
    lead = _lead(own, found.missing_keys)
    missing = {key.removeprefix(lead) for key in found.missing_keys if key.startswith(lead)} & set(own)
    strange = [key for key in found.unexpected_keys if is_adapter_path(key)]
    lost = [key for name in host.methods for part in host.parts(name) for key in _half(part, own, missing)]
    if strange or lost:
        raise AttachError(
            "The state that is loaded is that of other adapters than those on this model: "
            + ", ".join([*(f"{key} is not here" for key in strange[:3]), *(f"{key} is missing" for key in lost[:3])])
            + f". Attached: {', '.join(host.methods)}. Attach with the settings it was saved with, or load the adapter "
            "folder with al.load."
        )
    adapters = {*own_state(host, dict.fromkeys(own))}
    base = {*own} - adapters
    if base <= missing and adapters - missing:
        found.missing_keys[:] = [key for key in found.missing_keys if key.removeprefix(lead) not in base]
    _check_places(host, missing)
    for name in host.methods:
        host.refresh(name)


def watch_loads(model: nn.Module) -> None:
    """Let `state_loaded` follow every load into a model."""
    model.register_load_state_dict_post_hook(state_loaded)


def stop_watching(model: nn.Module) -> None:
    """Undo `watch_loads`, also on a copy of the model."""
    hooks = model._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is state_loaded]:
        del hooks[key]


def _check_places(host: Any, missing: set[str]) -> None:
    """Refuse base parameters with entries trained in place that are others than here: nothing knows their originals."""
    every = [p for held in host.patches.values() for p in held.values() if p.live and p.path not in missing]
    moved = [p.path for p in every if p.entries is not None and p.moved()]
    if moved:
        raise AttachError(
            f"The state that is loaded holds {moved[0]} with entries trained in place that are not those of the "
            "adapter here, so their original values would be lost. Load a state of the adapters alone, or the adapter "
            "folder with al.load onto the base."
        )


def _lead(own: list[str], missing: list[str]) -> str:
    """What stands before the model's own names where it is a part of the model that loads."""
    if {*missing} <= {*own}:
        return ""
    return next((key.removesuffix(name) for name in own for key in missing if key.endswith(f".{name}")), "")


def _half(name: str, own: list[str], missing: set[str]) -> list[str]:
    """Return what is missing of an adapter of which something is there."""
    tensors = [key for key in own if f".{ADAPTERS}.{name}." in f".{key}"]
    gone = [key for key in tensors if key in missing]
    return gone if len(gone) < len(tensors) else []
