"""Bottleneck adapters whose projections are sums of Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.hub import HubCodec, Options
from adapterlab.core.kept import Kept
from adapterlab.core.site import Site
from adapterlab.errors import AttachError
from adapterlab.methods.bottleneck import _hub
from adapterlab.methods.bottleneck._bottleneck import (
    Activation,
    After,
    AroundNorm,
    Projections,
    Reading,
    TappedSum,
    Weights,
    attention_outputs,
    copy_norms,
    feed_forwards,
)
from adapterlab.registry import register

_NAMES = {
    "down_S": "adapter_down.0.W_left",
    "down_T": "adapter_down.0.W_right",
    "down_bias": "adapter_down.0.b",
    "up_S": "adapter_up.W_left",
    "up_T": "adapter_up.W_right",
    "up_bias": "adapter_up.b",
}


class Factored(Projections):
    """The factors of one adapter; `S` and `T` of `down` and `up`, and the biases.

    Attributes:
        rule: A, which lies at the root of the model.
    """

    rule: Rule

    def make(self, method: Any, width: int, m: int, out: int) -> None:
        """Make and start the factors of both projections.

        Raises:
            AttachError: n does not divide a width.
        """
        check(method, self.site, width, m, out)
        n, r = method.n, method.rank
        self.down_S, self.down_T = self.site.parameter(n, width // n, r), self.site.parameter(n, r, m // n)
        self.down_bias = self.site.parameter(m)
        self.up_S, self.up_T = self.site.parameter(n, m // n, r), self.site.parameter(n, r, out // n)
        self.up_bias = self.site.parameter(out)
        self.kept = Kept()
        for factor in (self.down_S, self.down_T, self.up_S, self.up_T):
            for one in factor:
                nn.init.xavier_uniform_(one, gain=math.sqrt(2))

    def weights(self) -> Weights:
        """Both matrices, which are kept where nothing trains, and the biases."""
        a = self.rule.A.to(self.down_S.device)
        own = (self.down_S, self.down_T, self.up_S, self.up_T)

        def build() -> tuple[Tensor, Tensor]:
            return matrix(a, *own[:2]), matrix(a, *own[2:])

        changing = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        down, up = build() if changing else self.kept.once("matrices", build, self.rule.A, *own)
        return down, self.down_bias, up, self.up_bias

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; forget the matrices."""
        self.kept.clear()
        return super().train(mode)


class FactoredBehind(Factored, After):
    """Behind a sublayer."""


class FactoredAtNorm(Factored, AroundNorm):
    """At the norm behind a residual sum."""


class FactoredOfSum(Factored, TappedSum):
    """Behind a sublayer, on the sum that is yet to be made."""


@register
class Compacter(Reading):
    """Make both projections of a bottleneck adapter of Kronecker products whose small factors all adapters share.

    y = h + s · (up(f(down(h)))), f = GELU (its tanh form), s = 1, h the sublayer's output; with `reads` the adapter has
    another input, as in `adapter_pfeiffer`. Each projection `[in] → [out]` is x ↦ x H + b with H = Σ_i A_i ⊗ (S_i T_i)
    `[in, out]`, i = 1..n. A `[n, n, n]` is one tensor for both projections of all adapters;
    S `[n, in / n, r]` and T `[n, r, out / n]` are the projection's own, r = 1. n divides the model's width and m.

    Where it attaches: the output projection of every self-attention (of several attention sublayers in one block, the
    first) and the feed-forward block, or its second projection where it is not a module of its own. With
    `attention=False` the feed-forward sublayers alone: Compacter++. Norms train as copies.

    Start: A from a normal distribution with deviation 1e-4, S and T Glorot-uniform with gain √2, biases 0: nearly the
    base's output.

    Trainable parameters: r (d + m) + m and r (m + d) + d for each sublayer, n³ once, and the norms' own.

    Inference: not mergeable, since f is not linear. H is kept outside of training, so an adapter then costs what any
    bottleneck adapter does; in training building it takes in · out · n operations for a projection and a call.

    Where m is unset it is the model's width / `reduction`, rounded to a multiple of n. AdapterHub's `compacter++` reads
    the normalised sum, or the sum where blocks normalise first.

    Rate: 3e-3, as in the authors' runs; at smaller ones A hardly leaves its start.

    Reference: "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv 2106.04647.

    Example:
        >>> from adapterlab.methods.bottleneck.compacter import Compacter
        >>> Compacter().size(768), Compacter(attention=False).size(576)
        (24, 16)
    """

    formula: ClassVar[str] = "2 r (d + m) + m + d for each sublayer + n³ + norms"
    starts_at_base: ClassVar[bool] = False
    Layer: ClassVar[Callable[..., Factored]] = FactoredBehind
    AtNorm: ClassVar[Callable[..., Factored]] = FactoredAtNorm
    OfSum: ClassVar[Callable[..., Factored]] = FactoredOfSum

    n: int = Field(4, ge=1, description="number of Kronecker products in a projection; divides width and bottleneck")
    rank: int = Field(1, ge=1, description="rank r of the second factors S_i T_i")
    reduction: float = Field(32.0, ge=1, description="width of the model over that of the bottleneck, when m is unset")
    activation: Activation = Field("gelu_tanh", description="nonlinearity between the projections")
    attention: bool = Field(True, description="adapt self-attention as well; without it the method is Compacter++")
    norms: bool = Field(True, description="train copies of all layer norms")
    reads: Literal["normed", "output", "sum"] = Field(
        "output",
        description="input of the adapter: the sublayer's output, the normalised sum where a norm follows it, or the "
        "sum in blocks that normalise first",
    )

    hub: ClassVar[HubCodec | None] = _hub.codec(
        when={"phm_layer": True, "output_adapter": True, "is_parallel": False},
        derived=lambda host, options, tensors: _read(host, options),
        outward=lambda host, key, method: _written(host, method),
        names=_NAMES,
        fields={"n": "phm_dim", "rank": "phm_rank"},
        ignores=("mh_adapter", "phm_c_init", "phm_init_range", "hypercomplex_nonlinearity"),
        shared={"rule.A": "shared_parameters.phm_rule"},
    )

    @model_validator(mode="after")
    def _norms_are_free(self) -> Self:
        if self.norms and self.reads != "output":
            raise ValueError(
                f"reads={self.reads!r} needs norms=False: the adapters stand at norms that would be copied"
            )
        return self

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the sublayers, and let all adapters use one A."""
        super().attach(host, name)
        layers = [adapter for adapter in host.adapters(name).values() if isinstance(adapter, Factored)]
        rule = host.share(name, "rule", Rule(layers[0].site, self.n))
        for layer in layers:
            layer.refer("rule", rule)
        if self.norms:
            copy_norms(host, name)

    def places(self, sites: Sequence[Site]) -> list[Site]:
        """The first attention sublayer of each block, and every feed-forward sublayer."""
        first: dict[tuple[str | None, int | None], Site] = {}
        for site in attention_outputs(sites) if self.attention else []:
            first.setdefault((site.stack, site.layer), site)
        return [*first.values(), *feed_forwards(sites)]

    def size(self, width: int) -> int:
        """Width of the bottleneck where the model's is `width`."""
        return self.m or self.n * max(1, round(width / self.reduction / self.n))


class Rule(nn.Module):
    """The factors A `[n, n, n]` that all adapters share."""

    def __init__(self, site: Site, n: int):
        super().__init__()
        self.A = site.parameter(n, n, n)
        nn.init.normal_(self.A, std=1e-4)


def matrix(a: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Return Hᵀ = (Σ_i A_i ⊗ (S_i T_i))ᵀ `[out, in]`, without a Kronecker product for each i.

    Args:
        a: `[n, n, n]`.
        s: `[n, in / n, r]`.
        t: `[n, r, out / n]`.
    """
    blocks = torch.einsum("iae,icr,irf->efac", a.to(s.dtype), s, t)
    return blocks.flatten(2).flatten(0, 1)


def check(method: Any, site: Site, *widths: int) -> None:
    """Require that n divides the widths of a projection.

    Raises:
        AttachError: it does not.
    """
    common = math.gcd(*widths)
    if common % method.n:
        fitting = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
        raise AttachError(
            f"{method.id}: n = {method.n} must divide the widths of the projections at {site.path}, which are "
            f"{' and '.join(str(w) for w in dict.fromkeys(widths))}. Choose n from {fitting}, or m as a multiple of n."
        )


def _read(host: Carrier, options: Options) -> dict[str, Any]:
    return {"norms": False, "attention": bool(options["mh_adapter"]), **_hub.reads(host, options)}


def _written(host: Carrier, method: Compacter) -> dict[str, Any]:
    _hub.refuse_unless(not method.norms, method, "it trains norms, which the library leaves frozen (norms=False)")
    return {"mh_adapter": method.attention, **_hub.written(host, method)}
