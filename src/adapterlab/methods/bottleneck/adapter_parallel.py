"""Scaled bottleneck adapters beside the feed-forward sublayer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.hub import HubCodec, Options
from adapterlab.core.site import Site
from adapterlab.errors import FormatError
from adapterlab.methods.bottleneck import _hub
from adapterlab.methods.bottleneck._bottleneck import (
    Beside,
    Bottleneck,
    Tapped,
    entrance,
    feed_forwards,
    norm_before,
    tap,
    width_of,
)
from adapterlab.registry import register


@register
class AdapterParallel(Bottleneck):
    """Let a small two-layer network run beside the feed-forward sublayer, on the same input, and add its output.

    y = FFN(x) + s · (W_u f(W_d x + b_d) + b_u); W_d `[m, d]`, W_u `[d, m]`, f = ReLU. x is what the sublayer itself
    reads, after the norm in models that normalise first; with `reads="residual"` the residual stream before that norm,
    as in AdapterHub's library. Where the sum is normalised (BERT) the two are one. Beside one linear layer: W_d
    `[m, in]`, W_u `[out, m]`.

    Where it attaches: the feed-forward block (beside all experts of a mixture); where it is not a module of its own,
    from the input of the first projection to the output of the second. `targets` may name linear layers or other
    blocks, such as `attn`.

    Start: W_d Kaiming-uniform, W_u and biases 0, so the first output equals the base's.

    Trainable parameters: 2 m d + m + d for each block, and 1 with `learn_scale`.

    Inference: not mergeable, since f is not linear; it can run at the same time as the sublayer.

    In a batch whose rows have different adapters it works around modules, not from one projection to another.

    Rate: 1e-4, as in the authors' runs on GLUE; 5e-5 for summarisation with m = 512.

    Reference: "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv 2110.04366.

    Example:
        >>> from adapterlab.methods.bottleneck.adapter_parallel import AdapterParallel
        >>> AdapterParallel().scale
        4.0
    """

    formula: ClassVar[str] = "2 m d + m + d for each block"

    m: int | None = Field(512, ge=1, description="width of the bottleneck; None: the model's width / reduction")
    reduction: float = Field(2.0, ge=1, description="width of the model over that of the bottleneck, when m is unset")
    scale: float = Field(4.0, gt=0, description="factor s; 4 suits m = 512, 2 suits m = 16")
    reads: Literal["input", "residual"] = Field(
        "input",
        description="what it reads: the sublayer's input, or the residual stream before the norm in front of it",
    )
    learn_scale: bool = Field(False, description="train s, starting at `scale`")

    hub: ClassVar[HubCodec | None] = _hub.codec(
        when={"mh_adapter": False, "output_adapter": True, "is_parallel": True},
        derived=lambda host, options, tensors: _read(host, options),
        outward=lambda host, key, method: _written(host, method),
        start="mam_adapter",
    )

    def put(self, host: Carrier, name: str, site: Site, sites: Sequence[Site]) -> None:
        """Stand beside a module, or reach from the first feed-forward projection to the second."""
        if self.targets is None and site.kind == "linear":
            begin = entrance(site, sites)
            key = tap(host, name, site, begin)
            host.wrap(name, site, Tapped(self, site, begin.shape[1], site.shape[0], host.state, key))
        elif self.reads == "residual":
            key, width = tap(host, name, site, norm_before(site, sites)), width_of(site, sites)
            host.wrap(name, site, Tapped(self, site, width, width, host.state, key))
        elif site.kind == "linear":
            host.wrap(name, site, Beside(self, site, site.shape[1], site.shape[0]))
        else:
            host.wrap(name, site, Beside(self, site, width_of(site, sites)))

    def start(self, down: Tensor, up: Tensor) -> None:
        """Kaiming-uniform and zero."""
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))

    def scaling(self, site: Site) -> float | nn.Parameter:
        """S, which may be trained: `[1]`."""
        if not self.learn_scale:
            return self.scale
        learned = site.parameter(1)
        nn.init.constant_(learned, self.scale)
        return learned


def _has_entrance(host: Carrier) -> bool:
    """Say whether sublayers are no modules of their own, as in BERT, whose input is the residual stream itself."""
    return all(site.kind == "linear" for site in feed_forwards(host.all_sites()))


def _read(host: Carrier, options: Options) -> dict[str, Any]:
    """AdapterHub's adapter reads the residual stream, in front of the norm where that comes first."""
    if options.get("leave_out") or options.get("cross_adapter"):
        raise FormatError("Its options leave_out and cross_adapter have no form here. Use it with `adapters` itself.")
    return {"reads": "input" if _has_entrance(host) else "residual"}


def _written(host: Carrier, method: AdapterParallel) -> dict[str, Any]:
    what = "the library's adapter reads the residual stream before the norm (reads='residual')"
    _hub.refuse_unless(method.reads == "residual" or _has_entrance(host), method, what)
    _hub.refuse_unless(method.targets is None, method, "it stands at places of its own (targets)")
    return {}
