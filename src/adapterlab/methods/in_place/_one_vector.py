"""Entries of the whole base in one vector, for methods that choose them in the middle of a run or again and again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.engine.sparse import Vector
from adapterlab.errors import AttachError

KEY = "entries"
_LEAD = f"shared.{KEY}."


def attach(host: Carrier, name: str, parameters: Mapping[str, nn.Parameter], count: int, *, entire: bool) -> Vector:
    """Give an adapter a vector of so many entries of these parameters, none of them chosen yet.

    Args:
        host: of the model.
        name: of the adapter.
        parameters: by path.
        count: of the entries.
        entire: own the parameters entire for the time being.
    """
    vector = Vector(parameters, count)
    _own(host, name, vector, entire)
    return vector


def attach_saved(
    host: Carrier, name: str, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> Vector:
    """Attach the vector that an adapter was saved with.

    Raises:
        AttachError: it is of another base model.
    """
    index, sizes = tensors[f"{_LEAD}index"], tensors[f"{_LEAD}sizes"]
    vector = Vector(parameters, len(index))
    left = tensors.get(f"{_LEAD}left_index")
    positions = index if left is None else torch.cat([index, left])
    fits = torch.equal(sizes.to(vector.sizes.device), vector.sizes)
    if not fits or (len(positions) and int(positions.max()) >= vector.offsets[-1]):
        raise AttachError(
            f"The entries were chosen from {len(sizes)} parameters with {int(sizes.sum()):,} numbers, and here are "
            f"{len(parameters)} with {vector.offsets[-1]:,}, or others: they were chosen on another base model. Load "
            "that one, or train again."
        )
    if left is not None:
        vector.left_index = torch.empty_like(left, device=vector.index.device)
        vector.left_values = torch.empty_like(tensors[f"{_LEAD}left_values"], device=vector.index.device)
    vector.values.requires_grad_(bool((index >= 0).all()))
    _own(host, name, vector, entire=any(key.startswith("base.") for key in tensors))
    return vector


def saved_with(
    parameters: Mapping[str, nn.Parameter], entries: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor] | None:
    """Return the tensors of an adapter that holds these entries, by parameter ascending positions and values.

    None where they are of other parameters.
    """
    if not entries.keys() <= parameters.keys():
        return None
    vector = Vector(parameters, sum(len(index) for index, _ in entries.values()))
    ordered = [entries[path][1].float() for path in vector.paths if path in entries]
    index = vector.positions({path: index for path, (index, _) in entries.items()})
    vector.choose(index, torch.cat([values.to(index.device) for values in ordered]))
    return {f"{_LEAD}{key}": value.detach() for key, value in vector.state_dict().items()}


def of(host: Carrier, name: str) -> Vector:
    """The vector of an adapter."""
    part: Any = next(iter(host.patches[name].values())).chosen
    found: Vector = part.vector
    return found


def original(host: Carrier, name: str, vector: Vector, chosen: Mapping[str, Tensor]) -> Tensor:
    """Values in the base of entries of parameters that are owned entire, in the order of the vector."""
    held = host.patches[name]
    found = [held[path].original.view(-1)[chosen[path]].float() for path in vector.paths if path in chosen]
    return torch.cat([values.to(vector.values.device) for values in found])


def _own(host: Carrier, name: str, vector: Vector, entire: bool) -> None:
    host.share(name, KEY, vector)
    for path in vector.paths:
        host.own(name, path, chosen=vector.part(path), entire=entire)
