"""What LoKr and LoHa share: rank and scale by module, and their two kinds of dropout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adapterlab.core.adapter import Delta
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import LayerMethod
from adapterlab.core.patterns import Pattern, check_patterns, look_up
from adapterlab.core.site import Site
from adapterlab.errors import FormatError
from adapterlab.methods.structured._convolutions import along_channels, kernel, pads_otherwise

FIELDS = {
    "r": "r",
    "alpha": "alpha",
    "rank_dropout": "rank_dropout",
    "module_dropout": "module_dropout",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "effective_conv": "use_effective_conv2d",
}


def outward(method: object, layers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """Tensors for PEFT as they are; None where PEFT does not load them or computes something else with them."""
    if any(_differs(layer.site, layer.state_dict()) is not None for layer in layers.values()):
        return None
    return {}, {path: layer.state_dict() for path, layer in layers.items()}


def inward(method: object, site: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of PEFT as they are.

    Raises:
        FormatError: PEFT computes a convolution of this kind in another way.
    """
    reason = _differs(site, tensors)
    if reason is not None:
        raise FormatError(
            f"{site.path} has {reason}, so its file means something else there. Train the adapter with adapterlab."
        )
    return tensors


def _differs(site: Site, tensors: Mapping[str, Tensor]) -> str | None:
    """Say what PEFT computes otherwise on a convolution, if anything."""
    if len(kernel(site)) == 3:
        return "kernels of three axes, which these adapters of PEFT do not have"
    if pads_otherwise(site):
        return "a padding that PEFT's adapters of convolutions replace by zeros"
    if len(kernel(site)) == 1 and "w2" in tensors:
        return "one axis and a whole w2, whose Kronecker product PEFT lays out in another order"
    return None


class Lycoris(LayerMethod):
    """The settings that both have."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

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
    effective_conv: bool = Field(
        False, description="on convolutions with kernels beyond one, give low-rank factors a core t `[r, r, *k]`"
    )

    def rank(self, path: str) -> int:
        """Rank at one module."""
        return look_up(self.rank_pattern, path, self.r)

    def scaling(self, path: str) -> float:
        """The factor s at one module."""
        return look_up(self.alpha_pattern, path, self.alpha) / self.rank(path)

    def core(self, site: Site) -> tuple[int, ...] | None:
        """Shape of the core t at one module, or None where there is none; the kernel has two axes at least."""
        axes, r = kernel(site), self.rank(site.path)
        return (r, r, *axes, *[1] * (2 - len(axes))) if self.effective_conv and any(k > 1 for k in axes) else None

    def attach(self, host: Carrier, name: str) -> None:
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
            kept = (torch.rand(self.site.shape[0], device=y.device) >= self.rank_dropout).to(y.dtype)
            # When all rows fall out nothing is left to rescale.
            kept = kept / kept.mean().clamp(min=1 / len(kept)) if self.rescales else kept
            y = y * along_channels(self.site, kept)
        if self.training and self.module_dropout:
            y = y * (torch.rand((), device=y.device) >= self.module_dropout).to(y.dtype)
        return y
