"""Householder reflection adaptation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.adapter import Adapter, Tokenwise
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.registry import register


@register
class HRA(LayerMethod):
    """Multiply the weight by a short chain of learned reflections: an update that is orthogonal and of low rank.

    y = W H₁ H₂ ⋯ H_r x + b, with H_i = I − 2 û_i û_iᵀ and û_i = u_i / ‖u_i‖. u `[in, r]`, one reflection a column.
    The chain is applied to x as I − U T Uᵀ, T `[r, r]` upper triangular: two thin products instead of r passes.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too).

    Start: the columns of u are equal in pairs, whose reflections cancel, so the first output equals the base's. With
    `gram_schmidt` the columns are orthogonal to each other and nothing cancels: training starts from a changed model.

    Trainable parameters: r in for each module.

    Inference: W H₁ ⋯ H_r can be merged, at no cost; the singular values are those of W.

    Rate: 1e-4, as in the authors' runs on diffusion models; they take 1e-5 for Llama 2 and about 1e-3 for GLUE.

    Reference: "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
    arXiv 2405.17484.

    Example:
        >>> from adapterlab.methods.multiplicative.hra import HRA
        >>> HRA(r=4, orthogonality=1e-4).r
        4
    """

    formula: ClassVar[str] = "r in"

    r: int = Field(8, ge=1, description="number of reflections; even, so that they cancel in pairs at the start")
    gram_schmidt: bool = Field(False, description="orthogonalise the columns of u; the start is then not the base")
    orthogonality: float = Field(
        0.0,
        ge=0,
        description="weight of the extra loss ‖I − ÛᵀÛ‖² that keeps reflections apart; 1e-5 to 1e-3",
    )

    hf: ClassVar[HFCodec | None] = HFCodec(
        "HRA",
        fields={"r": "r", "gram_schmidt": "apply_GS"},
        tensors={"u": "hra_u"},
        transposed=False,
        accepts={"init_weights": (True, False), "bias": ("none",)},
    )

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.r % 2 and not self.gram_schmidt:
            raise ValueError(f"r = {self.r} is odd, so one reflection would remain at the start; choose {self.r + 1}")
        return self

    def penalty(self, host: Carrier, name: str) -> Tensor | None:
        """The weighted distance of the reflections' directions from being orthogonal to each other."""
        if not self.orthogonality:
            return None
        layers: Mapping[str, Any] = host.adapters(name)
        losses = [layer.overlap() for layer in layers.values() if isinstance(layer, HRA.Layer)]
        return self.orthogonality * torch.stack(losses).sum()

    class Layer(Adapter):
        """The reflections at one module."""

        def __init__(self, method: HRA, site: Site):
            super().__init__(site)
            self.gram_schmidt = method.gram_schmidt
            self.u = site.parameter(site.shape[1], method.r)
            columns = self.u if method.gram_schmidt else self.u[:, ::2]
            with torch.no_grad():
                nn.init.kaiming_uniform_(columns, a=math.sqrt(5))
                if not method.gram_schmidt:
                    self.u[:, 1::2] = self.u[:, ::2]

        def directions(self) -> Tensor:
            """Û `[in, r]`: u with columns of length one, orthogonal to each other if asked for."""
            return torch.linalg.qr(self.u)[0] if self.gram_schmidt else F.normalize(self.u, dim=0)

        def overlap(self) -> Tensor:
            """‖I − ÛᵀÛ‖² in the Frobenius norm."""
            unit = F.normalize(self.u, dim=0)
            return (torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device) - unit.T @ unit).square().sum()

        def reflectors(self) -> tuple[Tensor, Tensor]:
            """U and U T `[in, r]` with H₁ ⋯ H_r = I − U T Uᵀ."""
            unit = self.directions()
            if self.gram_schmidt:
                return unit, 2 * unit
            # T⁻¹ = ½ I + the part of ÛᵀÛ above the diagonal.
            inverse = (unit.T @ unit).triu(1) + 0.5 * torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
            return unit, torch.linalg.solve_triangular(inverse, unit, upper=True, left=False)

        def serving(self) -> Tokenwise:
            """Uᵀ and −W U T: the reflections of the input as an update of the weight."""
            unit, mixed = self.reflectors()
            return Tokenwise(unit.T, -self.site.unmerged.weight().to(mixed.dtype) @ mixed)

        def around(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Reflect the input."""
            unit, mixed = (factor.to(x.dtype) for factor in self.reflectors())
            y: Tensor = run(x - F.linear(F.linear(x, unit.T), mixed).to(x.dtype), *args, **kwargs)
            return y
