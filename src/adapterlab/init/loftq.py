"""A start that makes up for what quantization loses."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adapterlab.init._base import Initialiser, Place, Start, balanced, full_weight, part_of
from adapterlab.init._normal_float import quantized


class LoftQ(Initialiser):
    """The base becomes Q = quant(W − L), and s · B A the best approximation of W − Q; then again with L = s · B A.

    L starts at zero. The best of the iterations is kept, since the error does not always fall. The base is of full
    precision and holds the values that the quantized one unpacks to: blocks of 64 along the flattened weight, codes of
    NF4 (and of the normal float with 2, 3 or 8 bits), scales not quantized. With one iteration Q = quant(W), so the
    adapter fits the base model loaded in NF4.
    """

    moves_base: ClassVar[bool] = True
    low_rank: ClassVar[bool] = False

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits of a code")
    iterations: int = Field(1, ge=1, description="how often base and factors are fitted to each other; the paper has 5")
    block: int = Field(64, ge=1, description="entries that share one scale")

    @torch.no_grad()
    def start(self, place: Place) -> Start:
        """Alternate between the base and the factors."""
        part_of(place, place.r, f"init={self.name!r}")
        weight, r = full_weight(place.site), place.r
        out, in_ = weight.shape
        before = (weight.new_zeros(r, in_), weight.new_zeros(out, r))
        best, least = None, float("inf")
        for _ in range(self.iterations):
            base = self.base(weight - place.scale * before[1] @ before[0])
            u, s, vh = torch.linalg.svd(weight - base, full_matrices=False)
            a, b = balanced(u[:, :r], s[:r], vh[:r], place.scale)
            error = float(s[r:].norm())
            if best is None or error < least:
                best, least = Start(a, b, before), error
            before = (a, b)
        assert best is not None
        return best

    def base(self, weight: Tensor) -> Tensor:
        """What the quantized weight unpacks to."""
        return quantized(weight, self.bits, self.block)
