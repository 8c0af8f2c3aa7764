"""Low-rank Hadamard product adaptation."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.adapter import Delta
from adapterlab.core.codec import HFCodec
from adapterlab.core.site import Site
from adapterlab.methods.structured._convolutions import tucker
from adapterlab.methods.structured._lycoris import FIELDS, Lycoris, LycorisLayer, inward, outward
from adapterlab.methods.structured._rebuilt_updates import Rebuilt
from adapterlab.registry import register


@register
class LoHa(Lycoris):
    """Learn an additive update that is the entrywise product of two low-rank matrices: its rank may reach r².

    y = W x + b + s · ((w1_a w1_b) ⊙ (w2_a w2_b)) x, s = alpha / r, w1_a and w2_a `[out, r]`, w1_b and w2_b `[r, in]`.
    Where r² (in + out) < in · out it is computed as an ordinary product of rank r², and the matrix is never formed;
    else the matrix is built for each call and again for the backward pass, and not kept.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too) and convolutions, whose kernels count as
    `[out, in / groups · prod(k)]`. With `effective_conv` each product is that of a core t `[r, r, *k]` with `[r, out]`
    and `[r, in / groups]`.

    Start: w2_b = 0, or with `start="lycoris"` w2_a = 0, so the first output equals the base's.

    Trainable parameters: 2 r (in + out) for each module; 2 r (in / groups + out + r prod(k)) with cores.

    Inference: W + ΔW can be merged, at no cost.

    Rate: 5e-4, LoRA's.

    Reference: "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", arXiv 2309.14859;
    the product: "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", arXiv 2108.06098.

    Example:
        >>> from adapterlab.methods.structured.loha import LoHa
        >>> LoHa(r=4, alpha=8, targets=["q", "v"]).scaling("model.layers.0.self_attn.q_proj")
        2.0
    """

    formula: ClassVar[str] = "2 r (in + out)"

    start: Literal["peft", "lycoris"] = Field(
        "peft", description="uniform factors and w2_b = 0, or normal ones (w1_a with deviation 0.1) and w2_a = 0"
    )

    hf: ClassVar[HFCodec | None] = HFCodec(
        "LOHA",
        # How the factors began does not matter once they are trained.
        fields=FIELDS,
        tensors={key: f"hada_{key}" for key in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        accepts={"init_weights": (True, False)},
        transposed=False,
        outward=outward,
        inward=inward,
    )

    class Layer(LycorisLayer, Rebuilt):
        """The four factors of one module, and perhaps the two cores."""

        fused: ClassVar[bool | None] = True  # `forward` and the dropout of `added` act where there are no factors

        def __init__(self, method: LoHa, site: Site):
            super().__init__(method, site, rescales=True)
            out, in_ = site.shape
            r, core = method.rank(site.path), method.core(site)
            rows, columns = ((out, r), (r, in_)) if core is None else ((r, out), (r, in_ // math.prod(core[2:])))
            self.w1_a, self.w1_b = site.parameter(*rows), site.parameter(*columns)
            self.w2_a, self.w2_b = site.parameter(*rows), site.parameter(*columns)
            self.t1, self.t2 = (None if core is None else site.parameter(*core) for _ in range(2))
            cores = [t for t in (self.t1, self.t2) if t is not None]
            if method.start == "lycoris":
                for factor in (self.w1_a, *cores):
                    nn.init.normal_(factor, std=0.1)
                nn.init.normal_(self.w1_b)
                nn.init.normal_(self.w2_b)
            else:
                for factor in (self.w1_a, self.w1_b, self.w2_a, *cores):
                    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

        def delta(self) -> Tensor:
            """ΔW = s · (w1_a w1_b) ⊙ (w2_a w2_b) `[out, in]`, each product with its core if there is one."""
            if self.t1 is not None and self.t2 is not None:
                first, second = tucker(self.t1, self.w1_a, self.w1_b), tucker(self.t2, self.w2_a, self.w2_b)
                return self.scale * first * second
            return (self.scale * (self.w1_a @ self.w1_b)) * (self.w2_a @ self.w2_b)

        @property
        def thin(self) -> bool:
            """Whether the update as a product of rank r² costs less than the matrix it makes."""
            out, in_ = self.site.shape
            return self.site.kind == "linear" and self.w1_a.shape[1] ** 2 * (out + in_) < out * in_

        def factors(self) -> tuple[Tensor, Tensor] | None:
            """A `[r², in]` and B `[out, r²]` with s B A = ΔW: row and column i j are products of the i-th and j-th.

            Of (Σ_i a_i b_iᵀ) ⊙ (Σ_j c_j d_jᵀ) = Σ_ij (a_i ⊙ c_j) (b_i ⊙ d_j)ᵀ. None where that costs more than ΔW, or
            where rows of it are dropped.
            """
            if not self.thin or (self.training and (self.rank_dropout or self.module_dropout)):
                return None
            a = (self.w1_b[:, None] * self.w2_b).flatten(0, 1)
            return a, (self.w1_a[:, :, None] * self.w2_a[:, None]).flatten(1)

        def forward(self, x: Tensor) -> Tensor:
            """The update's share of the output, in the dtype of x: by thin factors, or without keeping ΔW."""
            return Delta.product(self, x) if self.thin else super().forward(x)
