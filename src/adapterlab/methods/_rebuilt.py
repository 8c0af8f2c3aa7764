"""Updates whose matrix ΔW has to be built before it can be used."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adapterlab.core.adapter import Delta


class Rebuilt(Delta):
    """A `Delta` that builds ΔW at each call and again in the backward pass.

    Kept by autograd, the matrices of all layers, and what they are made of, would take more memory than the model.
    Subclasses define `delta`.
    """

    def product(self, x: Tensor) -> Tensor:
        """The update's share of the output, in the dtype of x (of the parameters for token ids)."""
        dtype = x.dtype if x.is_floating_point() else self.dtype
        return self.site.op(x, self.delta().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The same, without keeping ΔW; a compiler decides by itself what to keep."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.product(x)
        y: Tensor = checkpoint(self.product, x, use_reentrant=False, preserve_rng_state=False)
        return y

    def added(self, x: Tensor) -> Tensor:
        """The matrix follows the dtype of x, which is therefore not copied."""
        share: Tensor = self(x)
        return share
