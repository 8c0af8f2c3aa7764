"""Letting an optimizer forget what it has learned of a parameter, wholly or in part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def moments(optimizer: Optimizer, p: nn.Parameter) -> list[Tensor]:
    """Return what an optimizer keeps of each entry of a parameter, its master left out."""
    state = {key: value for key, value in optimizer.state.get(p, {}).items() if key != "master"}
    return [value for value in _tensors(state) if value.shape == p.shape]


@torch.no_grad()
def thin_out(held: list[Tensor], share: float, by: Literal["magnitude", "random"]) -> None:
    """Forget a share of the entries: those where the first of the tensors is smallest, or any.

    What is forgotten of an entry is forgotten in all of them: a mean whose square is gone would make a huge step.
    """
    if not held:
        return
    sizes = held[0].abs()
    if by == "random":
        kept = torch.rand(sizes.shape, device=sizes.device) >= share
    elif count := int(share * sizes.numel()):
        # Not torch.quantile, which refuses tensors of more than 16 million entries.
        kept = sizes > sizes.flatten().kthvalue(count).values
    else:
        return
    for values in held:
        values.mul_(kept)


@torch.no_grad()
def reorder(held: list[Tensor], source: Tensor, kept: Tensor) -> None:
    """Give the entries of vectors other places: entry i takes what entry `source[i]` had, or 0 where it is not kept."""
    for values in held:
        values.copy_(torch.where(kept, values[source], torch.zeros((), dtype=values.dtype, device=values.device)))


@torch.no_grad()
def written(optimizer: Optimizer, p: nn.Parameter) -> None:
    """Take over a value that was written into a parameter: a master would bring the old one back."""
    if "master" in optimizer.state.get(p, {}):
        optimizer.state[p]["master"].copy_(p)


def _tensors(state: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in state.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value
