"""Factors of adapters that nobody trains: what is made of them may be kept while nothing writes to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Rest(NamedTuple):
    """The factors of an adapter, and how often they had been written to."""

    adapter: Any
    a: Tensor
    a_version: int
    b: Tensor
    b_version: int
    scale: float


def factors_at_rest(live: tuple[Any, ...]) -> list[Rest] | None:
    """Return what the factors of adapters were when nobody trains them, or None: they are not tensors that stay.

    Writes through `.data` cannot be seen: `Delta.train` forgets what was kept.
    """
    held: list[Rest] = []
    for adapter in live:
        found = None if adapter.training or not adapter.is_its_factors else adapter.factors()
        if found is None or adapter.added_bias is not None or adapter.site.kind != "linear":
            return None
        a, b = found
        if not (isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter)) or a.is_inference() or b.is_inference():
            return None
        held.append(Rest(adapter, a, a._version, b, b._version, adapter.scale))
    return held


def unchanged(held: list[Rest], live: tuple[Any, ...]) -> bool:
    """Say whether these are the adapters, and still have the factors, with the values that they had."""
    if len(held) != len(live) or any(rest.adapter is not adapter for rest, adapter in zip(held, live, strict=True)):
        return False
    for adapter, a, a_version, b, b_version, scale in held:
        now = adapter.factors()
        if now[0] is not a or now[1] is not b or adapter.training or adapter.scale != scale:
            return False
        if a._version != a_version or b._version != b_version:
            return False
    return True


def behind(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """The pair (A `[r, in]`, B `[out, r]`) that is the sum of several, or None of none."""
    if len(pairs) < 2:
        return pairs[0] if pairs else None
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)


class Padded:
    """Several pairs of factors of one module, padded with zeros to the largest rank.

    Attributes:
        a: A `[n, r, in]`.
        b: Bᵀ with its factor `[n, r, out]`.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor] | None]):
        """Stack (A `[r, in]`, B `[out, r]` with its factor); None has no update."""
        first = next(pair for pair in pairs if pair is not None)
        rank = max(len(pair[0]) for pair in pairs if pair is not None)
        self.a = first[0].new_zeros(len(pairs), rank, first[0].shape[1])
        self.b = first[1].new_zeros(len(pairs), rank, len(first[1]))
        for place, pair in enumerate(pairs):
            if pair is not None:
                a, b = pair
                self.a[place, : len(a)] = a.detach()
                self.b[place, : len(a)] = b.detach().T
