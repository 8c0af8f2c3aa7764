"""Scaled bottleneck adapters beside the feed-forward sublayer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.site import Site
from adapterlab.methods.bottleneck._bottleneck import Beside, Bottleneck, Tap, Tapped, entrance, width_of
from adapterlab.registry import register


@register
class AdapterParallel(Bottleneck):
    """Let a small two-layer network run beside the feed-forward sublayer, on the same input, and add its output.

    y = FFN(x) + s · (W_u f(W_d x + b_d) + b_u); W_d `[m, d]`, W_u `[d, m]`, f = ReLU. x is what the sublayer itself
    reads, after the norm in models that normalise first. Beside one linear layer: W_d `[m, in]`, W_u `[out, m]`.

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
    learn_scale: bool = Field(False, description="train s, starting at `scale`")

    def put(self, host: Carrier, name: str, site: Site, sites: Sequence[Site]) -> None:
        """Stand beside a module, or reach from the first feed-forward projection to the second."""
        if self.targets is None and site.kind == "linear":
            begin, key = entrance(site, sites), f"{name}:{site.path}"
            host.wrap(name, begin, Tap(begin, host.state, key))
            host.wrap(name, site, Tapped(self, site, begin.shape[1], site.shape[0], host.state, key))
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
