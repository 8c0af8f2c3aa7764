"""A mixture of low-rank updates with a router for each module."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.errors import AttachError
from adapterlab.registry import register


@register
class MoLoRA(LayerMethod):
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
    beside the large ones of 4 t out in; and the router's.

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
    r: int = Field(4, ge=1, description="rank of each update")
    alpha: float = Field(16.0, gt=0, description="scale numerator")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the updates' input, one mask for all")
    top_k: int | None = Field(None, ge=1, description="experts used for a token; None: all, which works better")

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.top_k is not None and self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} is more than experts={self.experts}; lower it, or leave it out")
        return self

    @property
    def scaling(self) -> float:
        """The factor s."""
        return self.alpha / self.r

    def build(self, site: Site, host: Carrier, name: str) -> Adapter:
        """Make the experts and the router for one site.

        Raises:
            AttachError: the weight is tied to another module, which has no input to route on.
        """
        if site.tied:
            raise AttachError(
                f"molora cannot adapt {site.path}: its weight is tied to another module's, and the choice of experts "
                "belongs to one module's input. Leave it out of the targets, for example targets=['all-linear']."
            )
        return super().build(site, host, name)

    class Layer(Adapter):
        """The experts and the router at one module."""

        not_linear: ClassVar[str] = "its router weighs the experts anew for every token"

        def __init__(self, method: MoLoRA, site: Site):
            super().__init__(site)
            out, in_ = site.shape
            self.A = site.parameter(method.experts, method.r, in_)
            self.B = site.parameter(method.experts, out, method.r)
            self.router = site.parameter(method.experts, in_)
            self.scale, self.p, self.top_k = method.scaling, method.dropout, method.top_k
            nn.init.normal_(self.A, std=0.02)
            nn.init.normal_(self.router, std=0.02)

        def weights(self, x: Tensor) -> Tensor:
            """What each expert counts for each token: `[..., in]` to `[..., E]`, in the router's dtype."""
            with torch.autocast(x.device.type, enabled=False):
                scores: Tensor = _Scores.apply(x, self.router)
                p = scores.softmax(-1)
            if self.top_k is None:
                return p
            top = p.topk(self.top_k, -1)
            return torch.zeros_like(p).scatter(-1, top.indices, top.values)

        def added(self, x: Tensor) -> Tensor:
            """S · Σ_e p_e B_e A_e drop(x), with one product for all A_e and one for all B_e."""
            p = (self.scale * self.weights(x)).to(x.dtype)
            x = F.dropout(x, self.p, self.training)
            h = self.site.op(x, self.A.to(x.dtype).flatten(0, 1)).unflatten(-1, self.A.shape[:2])
            wide = self.B.to(x.dtype).transpose(0, 1).flatten(1)
            return self.site.mix((h * p[..., None]).flatten(-2), wide)


class _Scores(torch.autograd.Function):
    """X Rᵀ in the dtype of R, which keeps x as it came: its copy in that dtype is made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor) -> Tensor:
        ctx.save_for_backward(x, router)
        return x.to(router.dtype) @ router.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, router = ctx.saved_tensors
        need_x, need_router = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grouter = rows.T @ x.reshape(-1, x.shape[-1]).to(router.dtype) if need_router else None
        return (grad @ router).to(x.dtype) if need_x else None, grouter
