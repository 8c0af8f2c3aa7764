"""Bottleneck adapters after the feed-forward sublayer only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.site import Site
from adapterlab.methods.bottleneck._bottleneck import AroundNorm, Bottleneck, Projections, width_of
from adapterlab.registry import register


@register
class AdapterPfeiffer(Bottleneck):
    """Put one small two-layer network with a skip connection into every block, behind the feed-forward sublayer.

    With r the sublayer's output, x the residual and A(h) = s · (W_u f(W_d h + b_d) + b_u), W_d `[m, d]`, W_u `[d, m]`,
    f = ReLU, s = 1: blocks that normalise after the sum (BERT) give y = LN(x + r + A(LN(x + r))), with the same norm
    twice (`reads="normed"`) or y = LN(x + r + A(r)) (`reads="output"`); others give y = x + r + A(r).

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
    kinds: ClassVar[tuple[str, ...]] = ("linear", "block", "norm")
    AtNorm: ClassVar[Callable[..., Projections]] = AroundNorm

    reads: Literal["normed", "output"] = Field(
        "normed", description="input of the adapter in blocks that normalise after the residual sum"
    )
    init_std: float = Field(0.02, ge=0, description="deviation of the projections at the start")

    def put(self, host: Carrier, name: str, site: Site, sites: Sequence[Site]) -> None:
        """Wrap the norm behind the sublayer if there is one and it is to be read, else the sublayer."""
        norm = site if site.kind == "norm" else _norm_behind(site, sites)
        if norm is None or (self.reads == "output" and norm is not site):
            super().put(host, name, site, sites)
        else:
            host.wrap(name, norm, type(self).AtNorm(self, norm, width_of(norm, sites)))

    def start(self, down: Tensor, up: Tensor) -> None:
        """Normal."""
        for weight in (down, up):
            nn.init.normal_(weight, std=self.init_std)


def _norm_behind(site: Site, sites: Sequence[Site]) -> Site | None:
    """The norm of a module that holds nothing but one projection and one norm, as BERT's outputs do."""
    parent = site.path.rpartition(".")[0]
    beside = [s for s in sites if s.path.rpartition(".")[0] == parent and s.kind in ("linear", "norm")]
    norms = [s for s in beside if s.kind == "norm"]
    return norms[0] if site.kind == "linear" and len(beside) == 2 and len(norms) == 1 else None
