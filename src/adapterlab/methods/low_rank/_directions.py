"""Starts that take a part of rank r out of the base weight: W = (W − s · B0 A0) + s · B0 A0."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from adapterlab.methods.low_rank._starts import Initialiser, Place, Start, full_weight, part_of


class Directions(Initialiser):
    """Factors made of directions of the base weight, which gives them up; subclasses choose which."""

    moves_base: ClassVar[bool] = True

    def factors(self, weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
        """Choose A `[r, in]` and B `[out, r]` from a float32 weight `[out, in]`."""
        raise NotImplementedError

    @torch.no_grad()
    def start(self, place: Place) -> Start:
        """Decompose the weight; the model computes what it did, whatever the directions."""
        part_of(place, place.r, f"init={self.name!r}")
        a, b = self.factors(full_weight(place.site), place.r, place.scale)
        return Start(a, b, (a, b))
