"""Bottleneck adapters after attention and after the feed-forward sublayer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.hub import HubCodec
from adapterlab.core.site import Site
from adapterlab.core.targets import Targets
from adapterlab.methods.bottleneck import _hub
from adapterlab.methods.bottleneck._bottleneck import (
    Activation,
    Bottleneck,
    attention_outputs,
    copy_norms,
    feed_forwards,
)
from adapterlab.registry import register


@register
class AdapterHoulsby(Bottleneck):
    """Put a small two-layer network with a skip connection behind every sublayer, and train the norms with it.

    y = h + s · (W_u f(W_d h + b_d) + b_u), where h is the sublayer's output before the residual sum; W_d `[m, d]`,
    W_u `[d, m]`, f = GELU, s = 1.

    Where it attaches: the output projection of every attention sublayer (cross-attention too) and the feed-forward
    block, or its second projection where it is not a module of its own. Mixture-of-experts blocks get one adapter for
    all experts. A sublayer's dropout that is a module outside these runs after the adapter, not before it. Norms train
    as copies, which leave the base's untouched and are switched with the adapter.

    Start: W_d and W_u from a normal distribution with deviation `init_std`, cut at two deviations, biases 0: nearly the
    base's output.

    Trainable parameters: 2 m d + m + d for each sublayer, and the norms' own.

    Inference: not mergeable, since f is not linear; two thin products more for each sublayer.

    Rate: 3e-4, the authors' example; they try 3e-5, 3e-4 and 3e-3.

    Reference: "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751.

    Example:
        >>> from adapterlab.methods.bottleneck.adapter_houlsby import AdapterHoulsby
        >>> AdapterHoulsby(m=None, reduction=16).size(768)
        48
    """

    formula: ClassVar[str] = "2 m d + m + d for each sublayer + norms"
    starts_at_base: ClassVar[bool] = False

    m: int | None = Field(64, ge=1, description="width of the bottleneck; None: the model's width / reduction")
    activation: Activation = Field("gelu", description="nonlinearity between the projections")
    init_std: float = Field(1e-3, ge=0, description="deviation of the projections at the start; above 1e-2 it hurts")
    norms: bool = Field(True, description="train copies of all layer norms; without them about 4 points are lost")

    hub: ClassVar[HubCodec | None] = _hub.codec(
        when={"mh_adapter": True, "output_adapter": True, "is_parallel": False, "original_ln_before": False},
        derived=lambda host, options, tensors: _read(host, tensors),
        outward=lambda host, key, method: _written(host, key, method),
    )

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the sublayers, and give the adapter norms of its own."""
        super().attach(host, name)
        if self.norms:
            copy_norms(host, name)

    def places(self, sites: Sequence[Site]) -> list[Site]:
        """Every attention and feed-forward sublayer."""
        return [*attention_outputs(sites), *feed_forwards(sites)]

    def start(self, down: Tensor, up: Tensor) -> None:
        """Truncated normal."""
        for weight in (down, up):
            nn.init.trunc_normal_(weight, std=self.init_std, a=-2 * self.init_std, b=2 * self.init_std)


def _read(host: Carrier, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sublayers that a file of AdapterHub's has adapters for; it trains no norms."""
    sites = host.all_sites()
    found = _hub.chosen(host, tensors, [*attention_outputs(sites), *feed_forwards(sites)])
    return {"norms": False, "targets": Targets(include=tuple(site.path for site in found) or ("no module",))}


def _written(host: Carrier, key: str, method: AdapterHoulsby) -> dict[str, Any]:
    """AdapterHub's option for cross-attention, which is the second attention sublayer of a layer."""
    _hub.refuse_unless(not method.norms, method, "it trains norms, which the library leaves frozen (norms=False)")
    sites = host.all_sites()
    attention, adapted = attention_outputs(sites), {part.site.path for part in _hub.places(host, key).values()}
    first: dict[tuple[str | None, int | None], str] = {}
    for site in attention:
        first.setdefault((site.stack, site.layer), site.path)
    usual = {*first.values(), *(site.path for site in feed_forwards(sites))}
    cross = {site.path for site in attention} - usual
    _hub.refuse_unless(adapted in (usual, usual | cross), method, "it adapts other sublayers than all of a kind")
    return {"cross_adapter": bool(cross) and adapted != usual}
