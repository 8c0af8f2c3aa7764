"""What LoKr and LoHa share: rank and scale by module, and their two kinds of dropout."""

from __future__ import annotations

import re
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from adapterlab.core.adapter import Delta
from adapterlab.core.host import Host
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.errors import TargetError, nearest
from adapterlab.methods.lora import matches

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
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="other ranks for modules whose path ends in a match of the key"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="likewise for alpha"
    )

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _readable(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{key!r} is not a valid regular expression ({error})") from None
        return value

    def rank(self, path: str) -> int:
        """Rank at one module."""
        return next((rank for key, rank in self.rank_pattern.items() if matches(key, path)), self.r)

    def scaling(self, path: str) -> float:
        """The factor s at one module."""
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if matches(key, path)), self.alpha)
        return alpha / self.rank(path)

    def attach(self, host: Host, name: str) -> None:
        """Wrap the targets.

        Raises:
            TargetError: a pattern matches none of them.
        """
        super().attach(host, name)
        adapted = host.adapters(name)
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field):
                if not any(matches(key, path) for path in adapted):
                    names = {path.rpartition(".")[2] for path in adapted}
                    raise TargetError(
                        f"{self.id}: {field} names {key!r}, which no adapted module has. {nearest(key, names)}"
                    )


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
