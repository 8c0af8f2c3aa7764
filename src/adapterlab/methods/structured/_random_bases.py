"""Adapters whose large factors are random, frozen and the same at all modules; see `vera` and `randlora`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.adapter import Delta
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site


class Bases(nn.Module):
    """Two random tensors that all modules slice theirs from.

    Args:
        a: any tensor.
        b: likewise.
        saved: keep them in saved adapters; otherwise they are drawn again from the seed.
    """

    A: Tensor
    B: Tensor

    def __init__(self, a: Tensor, b: Tensor, saved: bool):
        super().__init__()
        self.register_buffer("A", a, persistent=saved)
        self.register_buffer("B", b, persistent=saved)


class RandomBases(LayerMethod):
    """General form: draw the bases once, for the largest module, and give every module a reference to them."""

    year: ClassVar[int] = 2023

    seed: int = Field(0, ge=0, lt=1 << 63, description="of the random bases")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    save_projection: bool = Field(
        True, description="store the random bases too; without, they are drawn again from the seed on loading"
    )

    def draw(self, out: int, in_: int) -> tuple[Tensor, Tensor]:
        """Draw the bases for modules of at most this size, on the CPU, as HF PEFT does."""
        raise NotImplementedError

    def attach(self, host: Carrier, name: str) -> None:
        """Share the bases and wrap the targets."""
        sites = host.sites(self.targets, self.kinds)
        largest = [max(sizes) for sizes in zip(*(site.shape for site in sites), strict=True)]
        a, b = (t.to(sites[0].device, sites[0].dtype) for t in self.draw(largest[0], largest[1]))
        bases = host.share(name, "bases", Bases(a, b, self.save_projection))
        for site in sites:
            adapter = self.build(site, host, name)
            adapter.refer("bases", bases)
            host.wrap(name, site, adapter)


class SlicedDelta(Delta):
    """The part at one module, with its reference to the bases."""

    bases: Bases

    def __init__(self, method: RandomBases, site: Site):
        super().__init__(site)
        self.p = method.dropout

    def added(self, x: Tensor) -> Tensor:
        """The factors follow the dtype of x, which is therefore not copied."""
        share: Tensor = self(nn.functional.dropout(x, self.p) if self.training and self.p else x)
        return share


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU, whose numbers are the same on every machine with the same torch."""
    return torch.Generator(device="cpu").manual_seed(seed)


def codec(peft_type: str, name: str, fields: Mapping[str, Any], trained: Mapping[str, str]) -> HFCodec:
    """How PEFT stores an adapter of this form.

    Args:
        peft_type: PEFT's name of the method.
        name: what its options and tensors begin with.
        fields: further fields of ours -> PEFT's options.
        trained: our trained tensors -> PEFT's.
    """
    return HFCodec(
        peft_type,
        fields={
            "r": "r",
            "seed": "projection_prng_key",
            "dropout": f"{name}_dropout",
            "save_projection": "save_projection",
            **fields,
        },
        tensors=trained,
        shared={"bases.A": f"base_model.{name}_A", "bases.B": f"base_model.{name}_B"},
        accepts={"bias": ("none",), "init_weights": (True, False)},
    )
