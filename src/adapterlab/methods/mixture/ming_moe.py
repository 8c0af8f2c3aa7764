"""A sparse mixture of low-rank updates in the feed-forward network, and plain low-rank updates in the attention."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from adapterlab.core.carrier import Carrier
from adapterlab.core.site import Site
from adapterlab.core.targets import matcher
from adapterlab.errors import TargetError
from adapterlab.methods.mixture._experts import Mixture, Routed
from adapterlab.registry import register


@register
class MingMoE(Mixture):
    """Learn several low-rank updates for each feed-forward weight, of which a router takes a few, and one elsewhere.

    Feed-forward: y = W x + b + s · Σ_{e in top k} c_e(x) B_e A_e drop(x), c = softmax of the k largest of z = S x + d,
    s = alpha / r or alpha / √r; A `[E, r, in]`, B `[E, out, r]`, S `[E, in]`, d `[E]`. The other modules have LoRA:
    y = W x + b + s · B A drop(x). With one expert all of it is LoRA, and merges.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too) whose weight is not tied; those that
    `routed` names get a router.

    Start: B = 0, so the first output equals the base's; A, S and d as linear layers start, between ±1/√in.

    Trainable parameters: E r (in + out) + E (in + 1) for each routed module, r (in + out) for each of the others.

    Inference: routed modules are not mergeable, since the choice depends on the token. It sees one token at a time, so
    caches, padding and mixed batches change nothing.

    All experts are computed and those not chosen count 0, as in the authors' training; their code leaves out the
    dropout then, and this one does not. No balancing loss: the authors' code has an option that drops the experts'
    output.

    Cost of a step: the thin products of a routed module are those of a LoRA of rank E r, 6 t E r (out + in) operations
    for t tokens, beside the large ones of 4 t out in; and the router's.

    Rate: 2e-4, as for LoRA on models of billions; none is given in the authors' code.

    Reference: "MING-MOE: Enhancing Medical Multi-Task Learning in Large Language Models with Sparse Mixture of Low-Rank
    Adapter Experts", arXiv 2404.09027.

    Example:
        >>> from adapterlab.methods.mixture.ming_moe import MingMoE
        >>> MingMoE(experts=4, top_k=2, r=16, alpha=32).scaling
        2.0
    """

    formula: ClassVar[str] = "E (r (in + out) + in + 1) for routed modules, r (in + out) for the others"
    renormalised: ClassVar[bool] = True
    shifted: ClassVar[bool] = True

    r: int = Field(32, ge=1, description="rank of each update")
    experts: int = Field(4, ge=1, description="number of low-rank updates of a routed module")
    top_k: int = Field(2, ge=2, description="experts used for a token; with one its weight would always be 1")
    scale: Literal["linear", "sqrt"] = Field("linear", description="alpha / r, or alpha / √r")
    routed: tuple[str, ...] = Field(
        ("gate", "up", "gate_up", "down"), description="adapted modules (entries as in targets) that get a router"
    )

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if 1 < self.experts < self.top_k:
            raise ValueError(f"top_k={self.top_k} is more than experts={self.experts}; lower it, or add experts")
        return self

    @property
    def scaling(self) -> float:
        """The factor s."""
        return self.alpha / (self.r if self.scale == "linear" else math.sqrt(self.r))

    def count(self, site: Site) -> int:
        """Experts where a router stands, else one update."""
        return self.experts if any(matcher(entry)(site) for entry in self.routed) else 1

    def selected(self) -> int | None:
        """As the setting says."""
        return self.top_k

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the targets.

        Raises:
            TargetError: none of them would be routed.
        """
        super().attach(host, name)
        adapted = host.adapters(name)
        if self.experts > 1 and not any(isinstance(layer, Routed) for layer in adapted.values()):
            raise TargetError(
                f"ming_moe: none of the {len(adapted)} adapted modules is one of routed={list(self.routed)}, so there "
                "would be no experts. Name modules among the targets in routed, or take the method lora."
            )
