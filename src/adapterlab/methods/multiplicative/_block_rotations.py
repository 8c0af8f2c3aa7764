"""Methods that rotate features by blocks of neighbours, however a block is made of what trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.errors import AttachError
from adapterlab.methods.multiplicative._rotations import Rotation, Turn, divisors, nearest_divisor, skew, width

if TYPE_CHECKING:
    from torch.optim import Optimizer


class BlockRotation(LayerMethod):
    """Rotations by blocks; subclasses say how R − I comes from a skew-symmetric matrix."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding")
    formula: ClassVar[str] = "in (block_size - 1) / 2"
    block_size: int = Field(32, ge=0, description="features in a block; it divides those of every target")
    blocks: int = Field(0, ge=0, description="number of blocks in every target instead of their size; 0: by the size")
    uneven: Literal["error", "nearest"] = Field(
        "error", description="where the size or number does not divide: refuse, or take the divisor nearest to it"
    )
    share: bool = Field(False, description="one block for all places of a module")
    eps: float | None = Field(
        None, gt=0, description="constrained form: ‖Q_i‖ of each of n blocks stays within eps / √n; none: free"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="probability that a place is not rotated in a training step")
    rescale: bool = Field(False, description="also train a factor on each output, which starts at one")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if not self.block_size and not self.blocks:
            raise ValueError(
                "block_size = 0 and blocks = 0 leave the blocks open; set one of them, such as 32 features"
            )
        return self

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Blocks that fit narrow layers."""
        return {"block_size": 8}

    def size(self, features: int) -> int:
        """Features in a block of a module that has so many."""
        if self.blocks:
            return features // nearest_divisor(features, self.blocks)
        return nearest_divisor(features, self.block_size)

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the targets.

        Raises:
            AttachError: the blocks do not divide the features of one.
        """
        sites = host.sites(self.targets, self.kinds)
        common = math.gcd(*(width(site) for site in sites))
        for site in sites:
            features, b = width(site), self.size(width(site))
            exact = features // b == self.blocks if self.blocks else b == self.block_size
            if b < 2 or not (exact or self.uneven == "nearest"):
                raise AttachError(self._unfit(site.path, features, common))
        super().attach(host, name)

    def _unfit(self, path: str, features: int, common: int) -> str:
        asked = f"blocks={self.blocks}" if self.blocks else f"block_size={self.block_size}"
        field, _ = asked.split("=")
        fitting = [d if field == "block_size" else common // d for d in divisors(common)[1:]]
        choices = f"{field}={', '.join(map(str, sorted(fitting)))} fit" if fitting else f"No {field} fits"
        return (
            f"{self.id}: {asked} does not divide the {features} features of {path} into blocks of two and more. "
            f"{choices} every target; or set uneven='nearest', which takes what is nearest in each, or leave the "
            "module out."
        )

    def matrix(self, q: Tensor) -> Tensor:
        """R − I of a rotation R, for skew-symmetric Q `[n, b, b]`."""
        raise NotImplementedError

    def tensor_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Factors that start at one are not decayed."""
        return {"s": {"weight_decay": 0.0}} if self.rescale else {}

    def after_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Bring the blocks back to where the constraint allows them to be."""
        super().after_step(host, name, step, optimizer)
        layers: Mapping[str, Any] = host.adapters(name) if self.eps is not None else {}
        for layer in layers.values():
            if isinstance(layer, BlockRotation.Layer):
                with torch.no_grad():
                    layer.v.copy_(layer.inside())

    class Layer(Rotation):
        """The blocks of one module, `v` `[n, b (b − 1) / 2]`: what stands above the diagonal of each Q."""

        def __init__(self, method: BlockRotation, site: Site):
            super().__init__(site, method.rescale)
            self.method = method
            features = width(site)
            self.size = method.size(features)
            self.places = features // self.size
            stored = 1 if method.share else self.places
            self.limit = None if method.eps is None else method.eps / math.sqrt(stored)
            self.v = site.parameter(stored, self.size * (self.size - 1) // 2)

        def inside(self) -> Tensor:
            """The nearest point to v where ‖Q_i‖ ≤ eps / √n for every block; ‖Q_i‖² is twice ‖v_i‖²."""
            norms = math.sqrt(2) * torch.linalg.vector_norm(self.v, dim=1, keepdim=True)
            return self.v * (self.limit / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1)

        def constrained(self) -> Tensor:
            """V, or the point inside that counts instead; its gradient goes to v as it is, as when v had been moved."""
            if self.limit is None:
                return self.v
            return self.v + (self.inside() - self.v).detach()

        def turns(self) -> list[Turn]:
            """The blocks of R − I, some of them left out in training."""
            blocks = self.method.matrix(skew(self.constrained(), self.size))
            if self.training and self.method.dropout:
                drawn = torch.rand(self.places, 1, 1, device=blocks.device)
                blocks = blocks * (drawn >= self.method.dropout)
            return [Turn(blocks)]
