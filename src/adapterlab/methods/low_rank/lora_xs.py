"""LoRA between the singular vectors of the weight, with r² trainable numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.site import Site
from adapterlab.errors import AttachError
from adapterlab.methods.low_rank._starts import Initialiser
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register


@register
class LoRAXS(LoRA):
    """Freeze both factors at the weight's leading singular vectors and train a small matrix between them.

    y = W x + b + s · B M A x with W ≈ U_r Σ_r V_rᵀ, B = U_r `[out, r]` and A = Σ_r V_rᵀ `[r, in]` frozen, M `[r, r]`,
    s as in LoRA. The base stays as it is.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too, whose unpacked weight is decomposed).

    Start: M is normal with standard deviation `std`, so the first output is the base's up to that.

    Trainable parameters: r · r for each module, whatever its width.

    Inference: W + s B M A can be merged, at no cost. A and B are saved with M: singular vectors have no definite signs.

    Rate: 4e-3, as in the authors' runs on Mistral and Gemma.

    Reference: "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604.

    Example:
        >>> from adapterlab.methods.low_rank.lora_xs import LoRAXS
        >>> LoRAXS(r=64, alpha=64).scaling("model.layers.0.self_attn.q_proj")
        1.0
    """

    formula: ClassVar[str] = "r · r"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    hf: ClassVar[HFCodec | None] = None
    starts_at_base: ClassVar[bool] = False

    std: float = Field(1e-5, ge=0, description="standard deviation of M at the start")
    iterations: int = Field(10, ge=1, description="power iterations of the randomised decomposition")
    seed: int = Field(42, ge=0, lt=1 << 63, description="of the randomised decomposition")

    @field_validator("init")
    @classmethod
    def _fixed(cls, value: Initialiser) -> Initialiser:
        if value.name != "kaiming":
            raise ValueError(f"init={value.name!r} would be lost: lora_xs starts with singular vectors; leave it out")
        return value

    def attach(self, host: Carrier, name: str) -> None:
        """Attach with factors from the weights."""
        super().attach(host, name)
        for adapter in host.adapters(name).values():
            if isinstance(adapter, LoRAXS.Layer):
                adapter.decompose(self.iterations, self.seed)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach without a decomposition: the factors are saved."""
        super().attach(host, name)

    class Layer(LoRA.Layer):
        """Two frozen factors and the matrix between them."""

        def __init__(self, method: LoRAXS, site: Site):
            super().__init__(method, site)
            r = len(self.A)
            if r > min(site.shape):
                raise AttachError(
                    f"lora_xs: r={r} is more than the smaller side of {site.path} {site.shape}. Choose r up to "
                    f"{min(site.shape)}, or give this module another in rank_pattern."
                )
            for name in ("A", "B"):
                value = self._parameters.pop(name)
                self.register_buffer(name, value.detach())  # type: ignore[union-attr]
            self.M = site.parameter(r, r)
            nn.init.normal_(self.M, std=method.std)

        @torch.no_grad()
        def decompose(self, iterations: int, seed: int) -> None:
            """Set A and B from the weight."""
            weight, r = self.site.weight().to(self.dtype), len(self.M)
            with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
                torch.manual_seed(seed)
                u, s, v = torch.svd_lowrank(weight, min(r + 8, *weight.shape), iterations)
            self.B.copy_(u[:, :r])
            self.A.copy_((v[:, :r] * s[:r]).T)

        def factors(self) -> tuple[Tensor, Tensor]:
            """A, and B M: those of an ordinary LoRA that does the same."""
            return self.A, self.B @ self.M
