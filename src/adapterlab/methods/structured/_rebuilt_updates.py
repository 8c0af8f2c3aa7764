"""Updates whose matrix ΔW has to be built before it can be used."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adapterlab.core.adapter import Delta
from adapterlab.ops.low_rank import autocasts


class Rebuilt(Delta):
    """A `Delta` that builds ΔW at each call and again in the backward pass.

    Kept by autograd, the matrices of all layers, and what they are made of, would take more memory than the model.
    Subclasses define `delta`, and `sources` if it is made of more than the adapter's own parameters.

    Attributes:
        again: build ΔW again; else ΔW in the dtype of x, and what its making keeps, wait for the backward pass.
    """

    casts: ClassVar[bool] = False
    again: bool = True

    def sources(self) -> list[Tensor]:
        """The trained tensors that ΔW is made of."""
        return [p for p in self.parameters() if p.requires_grad]

    def product(self, x: Tensor) -> Tensor:
        """The update's share of the output, in the dtype of x (of the parameters for token ids)."""
        dtype = x.dtype if x.is_floating_point() else self.dtype
        return self.site.op(x, self.delta().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The same, without keeping ΔW where it is built again; a compiler decides by itself what to keep."""
        if not self.again or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.product(x)
        if self.site.kind == "linear" and not autocasts(x):
            made: Tensor = _Product.apply(self, x, *self.sources())
            return made
        y: Tensor = checkpoint(self.product, x, use_reentrant=False, preserve_rng_state=False)
        return y


class _Product(torch.autograd.Function):
    """x ΔWᵀ, which keeps x alone. A checkpoint would compute the product itself again too."""

    @staticmethod
    def forward(ctx: Any, layer: Rebuilt, x: Tensor, *sources: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, *sources)
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *sources = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        with torch.enable_grad():
            delta = ctx.layer.delta()
        gx = (g @ delta.detach().to(g.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
        made = torch.autograd.grad(delta, sources, (g.T @ rows).to(delta.dtype), allow_unused=True)
        return None, gx, *made
