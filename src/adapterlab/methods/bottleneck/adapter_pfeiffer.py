"""Bottleneck adapters after the feed-forward sublayer only."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.hub import HubCodec
from adapterlab.methods.bottleneck import _hub
from adapterlab.methods.bottleneck._bottleneck import Reading
from adapterlab.registry import register


@register
class AdapterPfeiffer(Reading):
    """Put one small two-layer network with a skip connection into every block, behind the feed-forward sublayer.

    With r the sublayer's output, x the residual and A(h) = s · (W_u f(W_d h + b_d) + b_u), W_d `[m, d]`, W_u `[d, m]`,
    f = ReLU, s = 1: blocks that normalise after the sum (BERT) give y = LN(x + r + A(LN(x + r))), with the same norm
    twice (`reads="normed"`) or y = LN(x + r + A(r)) (`reads="output"`); others give y = x + r + A(r), or with
    `reads="sum"` y = x + r + A(x + r), as in AdapterHub's library.

    Where it attaches: in blocks that normalise after the sum, the norm beside the second feed-forward projection; in
    others the feed-forward block, or its second projection where it is not a module of its own. Where the names
    do not tell that a norm follows the sum, name the norms as `targets`.

    Start: W_d and W_u from a normal distribution with deviation `init_std`, biases 0: nearly the base's output.

    Trainable parameters: 2 m d + m + d for each block.

    Inference: not mergeable, since f is not linear; two thin products more for each block.

    Rate: 1e-4, as in the authors' runs.

    Reference: "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", arXiv 2005.00247; the places of
    the norm and the skip connection are those of "AdapterHub: A Framework for Adapting Transformers", arXiv 2007.07779.

    Example:
        >>> from adapterlab.methods.bottleneck.adapter_pfeiffer import AdapterPfeiffer
        >>> AdapterPfeiffer(reduction=16).size(768)
        48
    """

    formula: ClassVar[str] = "2 m d + m + d for each block"
    starts_at_base: ClassVar[bool] = False

    init_std: float = Field(0.02, ge=0, description="deviation of the projections at the start")

    hub: ClassVar[HubCodec | None] = _hub.codec(
        when={"mh_adapter": False, "output_adapter": True, "is_parallel": False},
        derived=lambda host, options, tensors: _hub.reads(host, options),
        outward=lambda host, key, method: _hub.written(host, method),
    )

    def start(self, down: Tensor, up: Tensor) -> None:
        """Normal."""
        for weight in (down, up):
            nn.init.normal_(weight, std=self.init_std)
