"""Several sources as one: joined, one after the other, or drawn by weight as `datasets` draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from adapterlab.data.config import Mixing
from adapterlab.data.views import Joined, Picked

_Item = TypeVar("_Item")


class Named(Joined[_Item]):
    """Sequences behind each other that have names.

    Attributes:
        names: of all parts, empty ones too.
        named: the parts that are not empty, by name.
    """

    def __init__(self, parts: Sequence[Sequence[_Item]], names: Sequence[str]):
        super().__init__(parts)
        self.names = tuple(names)
        self.named = {name: part for name, part in zip(names, parts, strict=True) if len(part)}


class Mixture(Picked[_Item]):
    """One pass over several sequences.

    Attributes:
        parts: the sequences.
        mixing: how.
        weights: of the parts, where they are drawn by weight.
        seed: of the draw.
    """

    def __init__(self, parts: Sequence[Sequence[_Item]], mixing: Mixing, weights: Sequence[float], seed: int):
        self.parts, self.mixing, self.weights, self.seed = parts, mixing, tuple(weights), seed
        drawn = self._drawn() if weights else range(sum(map(len, parts)))
        super().__init__(Joined(parts), drawn)  # type: ignore[arg-type]

    @property
    def stages(self) -> tuple[int, ...]:
        """Rows of each part of a pass that has to be over before the next one begins; () where there is one."""
        return tuple(map(len, self.parts)) if self.mixing == "in_sequence" else ()

    def of(self, parts: Sequence[Sequence[Any]]) -> Mixture[Any]:
        """Return other sequences mixed in the same way."""
        return Mixture(parts, self.mixing, self.weights, self.seed)

    def _drawn(self) -> np.ndarray:
        import datasets

        ends = np.cumsum([len(part) for part in self.parts])
        sets = [
            datasets.Dataset.from_dict({"place": np.arange(end - len(part), end)})
            for part, end in zip(self.parts, ends, strict=True)
        ]
        shares = np.array(self.weights) / sum(self.weights)
        mixed = datasets.interleave_datasets(
            sets, probabilities=shares.tolist(), seed=self.seed, stopping_strategy=self.mixing
        )
        return np.asarray(mixed.with_format("numpy")[:]["place"])
