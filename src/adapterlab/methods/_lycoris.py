"""What LoKr and LoHa share: rank and scale by module, and their two kinds of dropout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from adapterlab.core.adapter import Delta
from adapterlab.core.host import Host
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.methods._patterns import Pattern, check_patterns, look_up

FIELDS = {
    "r": "r",
    "alpha": "alpha",
    "rank_dropout": "rank_dropout",
    "module_dropout": "module_dropout",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
CONVOLUTIONS = "use_effective_conv2d"  # an option of PEFT's that concerns convolutions alone


class Lycoris(LayerMethod):
    """The settings that both have."""

    r: int = Field(8, ge=1, description="rank of the thin factors")
    alpha: float = Field(8.0, gt=0, description="scale numerator: s = alpha / r")
    rank_dropout: float = Field(0.0, ge=0, lt=1, description="share of the update's output rows left out of a call")
    module_dropout: float = Field(0.0, ge=0, lt=1, description="probability that a module's update is left out")
    rank_pattern: dict[Pattern, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="other ranks for modules whose path ends in a match of the key"
    )
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="likewise for alpha"
    )

    def rank(self, path: str) -> int:
        """Rank at one module."""
        return look_up(self.rank_pattern, path, self.r)

    def scaling(self, path: str) -> float:
        """The factor s at one module."""
        return look_up(self.alpha_pattern, path, self.alpha) / self.rank(path)

    def attach(self, host: Host, name: str) -> None:
        """Wrap the targets.

        Raises:
            TargetError: a pattern matches none of them.
        """
        super().attach(host, name)
        tables: dict[str, Iterable[str]] = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        check_patterns(self.id, tables, host.adapters(name))


class LycorisLayer(Delta):
    """Drops output rows of the update, or all of it, for a whole call in training.

    Attributes:
        rescales: divide what is left by the share of rows kept.
    """

    def __init__(self, method: Lycoris, site: Site, rescales: bool):
        super().__init__(site)
        self.scale = method.scaling(site.path)
        self.rank_dropout, self.module_dropout, self.rescales = method.rank_dropout, method.module_dropout, rescales

    def added(self, x: Tensor) -> Tensor:
        """The update's share of the output, with dropout."""
        y = super().added(x)
        if self.training and self.rank_dropout:
            kept = (torch.rand(y.shape[-1], device=y.device) >= self.rank_dropout).to(y.dtype)
            # When all rows fall out nothing is left to rescale.
            y = y * (kept / kept.mean().clamp(min=1 / len(kept)) if self.rescales else kept)
        if self.training and self.module_dropout:
            y = y * (torch.rand((), device=y.device) >= self.module_dropout).to(y.dtype)
        return y
