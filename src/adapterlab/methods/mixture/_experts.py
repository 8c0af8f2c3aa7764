"""What routed methods share: a router that weighs experts token by token, and stacked low-rank experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter, Delta
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.core.state import State
from adapterlab.errors import AttachError
from adapterlab.ops import experts as ops
from adapterlab.ops.low_rank import autocasts


class Routed(Adapter):
    """Experts of any form at one module, and a router R `[E, width]` that weighs them for each token.

    The router computes in its own dtype, float32 on half-precision bases, whatever the dtype of x and under autocast.

    Attributes:
        router: R.
        shift: the bias `[E]` of the router, or None.
        top_k: experts that a token selects; None: all.
        renormalised: the weights of those sum to one; otherwise they are what the softmax over all experts gives.
        state: what the adapters of the model share.
    """

    not_linear: ClassVar[str] = "its router weighs the experts anew for every token"
    counts_tokens: ClassVar[bool] = True

    def __init__(self, site: Site, state: State):
        super().__init__(site)
        self.state = state

    def route(
        self, experts: int, width: int, *, top_k: int | None, renormalised: bool = False, shifted: bool = False
    ) -> None:
        """Make the router; after the experts, so that their tensors come first."""
        self.router = self.site.parameter(experts, width)
        self.shift = self.site.parameter(experts) if shifted else None
        self.top_k = None if top_k is None or top_k >= experts else top_k
        self.renormalised = renormalised

    def weights(self, x: Tensor) -> Tensor:
        """What each expert counts for each token: `[..., width]` to `[..., E]`, in the router's dtype."""
        with torch.autocast(x.device.type, enabled=False):
            return self.note(x, ops.scores(x, self.router, self.shift))

    def note(self, x: Tensor, z: Tensor) -> Tensor:
        """The weights that the scores z of the tokens x give; whoever wants to know of them is told."""
        chosen = ops.selection(z, self.top_k)
        w = ops.mixture(z, chosen, self.renormalised)
        self.routed(x, z, chosen, w)
        return w

    def routed(self, x: Tensor, z: Tensor, chosen: Tensor | None, w: Tensor) -> None:
        """Take note of how the tokens x were routed: by scores, choice and weights `[..., E]`."""
        self.state.observe(self.site.path, x, w)


class Experts(Routed):
    """Stacked low-rank experts: A `[E, r, in]`, B `[E, out, r]`.

    Also with few experts for each token all of them are computed, in two products with the weights between.
    """

    def __init__(self, method: Mixture, site: Site, count: int, state: State):
        super().__init__(site, state)
        out, in_ = site.shape
        self.A, self.B = site.parameter(count, method.r, in_), site.parameter(count, out, method.r)
        form = {"renormalised": method.renormalised, "shifted": method.shifted}
        self.route(count, in_, top_k=method.selected(), **form)
        self.scale, self.p = method.scaling, method.dropout
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Start A, the router and its bias as linear layers do; B is 0."""
        for tensor in (self.A, self.router, self.shift):
            if tensor is not None:
                uniform(tensor, self.site.shape[1])

    def added(self, x: Tensor) -> Tensor:
        """S · Σ_e w_e B_e A_e drop(x)."""
        dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return self.mixed(x, dtype=dtype)

    def whole(self, x: Tensor) -> Tensor | None:
        """Base and experts together."""
        weight, *again = self.site.frozen_weight(x.dtype)
        return self.mixed(x, weight=weight, bias=self.site.bias, again=again[0] if again else None)

    def mixed(self, x: Tensor, **more: Any) -> Tensor:
        """S · Σ_e w_e B_e A_e drop(x) and, given the weight and the bias of the base, W x + b."""
        more |= {"p": self.p if self.training else 0.0, "top_k": self.top_k, "renormalised": self.renormalised}
        y, z = ops.routed_low_rank(x, self.A, self.B, self.router, self.shift, scale=self.scale, **more)
        if self.state.listening or self.state.observed is not None:
            self.note(x, z)
        return y


class Single(Delta):
    """One expert, which needs no router: A `[1, r, in]`, B `[1, out, r]`."""

    casts: ClassVar[bool] = False

    def __init__(self, method: Mixture, site: Site):
        super().__init__(site)
        self.A, self.B = site.parameter(1, method.r, site.shape[1]), site.parameter(1, site.shape[0], method.r)
        self.scale, self.p = method.scaling, method.dropout
        uniform(self.A, site.shape[1])

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as they are."""
        return self.A[0], self.B[0]


class Mixture(LayerMethod):
    """Low-rank experts and a router at each module: y = W x + b + s · Σ_e w_e(x) B_e A_e drop(x).

    A module that has one expert has no router, and is adapted by a plain low-rank update that merges.

    Class attributes:
        renormalised: the weights of the experts that a token selects sum to one.
        shifted: the router has a bias.
    """

    renormalised: ClassVar[bool] = False
    shifted: ClassVar[bool] = False
    Layer: ClassVar[Callable[..., Adapter]] = Experts

    r: int = Field(4, ge=1, description="rank of each update")
    alpha: float = Field(16.0, gt=0, description="scale numerator")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the updates' input, one mask for all")

    @property
    def scaling(self) -> float:
        """The factor s."""
        return self.alpha / self.r

    def count(self, site: Site) -> int:
        """Experts at a module."""
        raise NotImplementedError

    def selected(self) -> int | None:
        """How many experts a token selects; None: all."""
        return None

    def build(self, site: Site, host: Carrier, name: str) -> Adapter:
        """Make the experts and the router for one site.

        Raises:
            AttachError: the weight is tied to another module, which has no input to route on.
        """
        return self.made(site, host, self.count(site))

    def made(self, site: Site, host: Carrier, count: int) -> Adapter:
        """Make so many experts and their router for one site, or a plain update in place of one."""
        refuse_tied(self.id, site)
        if count == 1:
            return Single(self, site)
        return type(self).Layer(self, site, count, host.state)


def refuse_tied(id: str, site: Site) -> None:
    """Refuse to route at a module whose weight another one uses too.

    Raises:
        AttachError: it is such a module.
    """
    if site.tied:
        raise AttachError(
            f"{id} cannot adapt {site.path}: its weight is tied to another module's, and the choice of experts "
            "belongs to one module's input. Leave it out of the targets, for example targets=['all-linear']."
        )


@torch.no_grad()
def uniform(tensor: Tensor, width: int) -> None:
    """Draw between −1 / √width and 1 / √width: Kaiming's start with a = √5, that of linear layers."""
    nn.init.uniform_(tensor, -1 / math.sqrt(width), 1 / math.sqrt(width))
