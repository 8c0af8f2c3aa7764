"""The adapters on a model, seen from another root: from a part of the model, or from a model around it."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from adapterlab.engine.anatomy import Anatomy
from adapterlab.engine.attachments import Attachments
from adapterlab.engine.wrapping import HOST, STATE
from adapterlab.errors import AttachError
from adapterlab.foreign.model import ADAPTERS, SHARED, base_modules, plain_path, unwrapped
from adapterlab.foreign.sharding import is_sharded


def carriers(model: nn.Module) -> list[Attachments]:
    """Return everything that has adapters in a model, whether it was attached to it, to a part, or around it."""
    found: dict[int, Attachments] = {}
    for _, module in base_modules(model):
        inside = module.__dict__[STATE].carrier if ADAPTERS in module._modules else None
        for carrier in (module.__dict__.get(HOST), inside):
            if carrier is not None and carrier.methods:
                found[id(carrier)] = carrier
    return list(found.values())


def seen_as_whole(host: Attachments, key: str) -> Attachments:
    """Return the adapters with one part of a composite among them, by its key, as if it were attached by itself.

    It is for reading.
    """
    seen = copy.copy(host)
    seen.methods = {**host.methods, key: host.part_methods(key.partition("/")[0])[key]}
    return seen


def seen_from(host: Attachments, model: nn.Module) -> Attachments:
    """Return the adapters with the names they have from another root. It is for reading.

    Raises:
        AttachError: an adapter reaches outside of what is seen from there.
    """
    model = unwrapped(model)
    if model is host.model:
        return host
    above, below = _path(model, host.model), _path(host.model, model)

    def name(path: str) -> str | None:
        if above is not None:
            return f"{above}.{path}" if path else above
        inside = path == below or path.startswith(f"{below}.")
        return path[len(str(below)) + 1 :] if inside else None

    outside = [f"{key}: {path}" for key, held in host.places.items() for path in held if name(path) is None]
    if outside:
        raise AttachError(
            f"This {type(model).__name__} is a part of the {type(host.model).__name__} that adapters were attached to, "
            f"and they reach outside of it ({outside[0]}), so saving it would lose that. Save the adapters instead: "
            "al.host(model).save(folder, name)."
        )
    seen = copy.copy(host)
    for key, value in vars(Anatomy).items():
        if isinstance(value, functools.cached_property):
            seen.__dict__.pop(key, None)
    seen.model = model
    seen.places = {key: {str(name(p)): place for p, place in held.items()} for key, held in host.places.items()}
    seen.patches = {
        key: {str(name(p)): replace(patch, path=str(name(p))) for p, patch in held.items()}
        for key, held in host.patches.items()
    }
    return seen


def _path(outer: nn.Module, inner: nn.Module) -> str | None:
    return next((path for path, module in base_modules(outer) if module is inner), None)


@contextlib.contextmanager
def showing(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model hold the tensors of a state inside the context, where it names one: gathered ones, or a mean."""
    given = {plain_path(key): value for key, value in state.items()}
    changed: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, module in model.named_modules():
            lead = plain_path(f"{path}.") if path else ""
            tables: list[dict[str, Any]] = [module._parameters, module._buffers]
            for table in tables:
                for key, held in table.items():
                    value = given.get(lead + key)
                    if held is None or value is None or value is held or value.data_ptr() == _pointer(held):
                        continue
                    changed.append((table, key, held))
                    is_parameter = isinstance(held, nn.Parameter)
                    table[key] = nn.Parameter(value, requires_grad=held.requires_grad) if is_parameter else value
        yield
    finally:
        for table, key, held in changed:
            table[key] = held


def _pointer(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return -1


@contextlib.contextmanager
def bare(host: Attachments) -> Iterator[None]:
    """Take the adapters' tensors out of the model inside the context, and torch's wrappers out of its names.

    What is merged, or lives in the base's own parameters, stays.
    """
    changed: list[tuple[dict[str, Any], dict[str, Any]]] = []
    plain = not is_sharded(host.model)
    carrier = host.root.__dict__.pop(HOST, None)
    try:
        for _, module in list(base_modules(host.model)):
            kept = {k: m for k, m in module._modules.items() if k not in (ADAPTERS, SHARED)}
            kept = {k: unwrapped(m) if plain and m is not None else m for k, m in kept.items()}
            changed.append((module._modules, dict(module._modules)))
            module._modules.clear()
            module._modules.update(kept)
        yield
    finally:
        for table, before in changed:
            table.clear()
            table.update(before)
        if carrier is not None:
            host.root.__dict__[HOST] = carrier
