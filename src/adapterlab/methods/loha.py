"""Low-rank Hadamard product adaptation."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.site import Site
from adapterlab.io.hf_peft import HFCodec
from adapterlab.methods._lycoris import CONVOLUTIONS, FIELDS, Lycoris, LycorisLayer
from adapterlab.methods._rebuilt import Rebuilt
from adapterlab.registry import register


@register
class LoHa(Lycoris):
    """Learn an additive update that is the entrywise product of two low-rank matrices: its rank may reach r².

    y = W x + b + s · ((w1_a w1_b) ⊙ (w2_a w2_b)) x, s = alpha / r, w1_a and w2_a `[out, r]`, w1_b and w2_b `[r, in]`.
    The product has to be formed; it is built for each call and again for the backward pass, and not kept.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too).

    Start: w2_b = 0, or with `start="lycoris"` w2_a = 0, so the first output equals the base's.

    Trainable parameters: 2 r (in + out) for each module.

    Inference: W + ΔW can be merged, at no cost.

    Reference: "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", arXiv 2309.14859;
    the product: "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", arXiv 2108.06098.

    Example:
        >>> from adapterlab.methods.loha import LoHa
        >>> LoHa(r=4, alpha=8, targets=["q", "v"]).scaling("model.layers.0.self_attn.q_proj")
        2.0
    """

    family: ClassVar[str] = "weight delta"
    paper: ClassVar[str] = "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation"
    year: ClassVar[int] = 2023
    arxiv: ClassVar[str] = "2309.14859"
    formula: ClassVar[str] = "2 r (in + out)"

    start: Literal["peft", "lycoris"] = Field(
        "peft", description="uniform factors and w2_b = 0, or normal ones (w1_a with deviation 0.1) and w2_a = 0"
    )

    hf: ClassVar[HFCodec | None] = HFCodec(
        "LOHA",
        # How the factors began does not matter once they are trained.
        fields=FIELDS,
        tensors={key: f"hada_{key}" for key in ("w1_a", "w1_b", "w2_a", "w2_b")},
        accepts={"init_weights": (True, False), CONVOLUTIONS: (True,)},
    )

    class Layer(LycorisLayer, Rebuilt):
        """The four factors of one module."""

        def __init__(self, method: LoHa, site: Site):
            super().__init__(method, site, rescales=True)
            out, in_ = site.shape
            r = method.rank(site.path)
            self.w1_a, self.w1_b = site.parameter(out, r), site.parameter(r, in_)
            self.w2_a, self.w2_b = site.parameter(out, r), site.parameter(r, in_)
            if method.start == "lycoris":
                nn.init.normal_(self.w1_a, std=0.1)
                nn.init.normal_(self.w1_b)
                nn.init.normal_(self.w2_b)
            else:
                for factor in (self.w1_a, self.w1_b, self.w2_a):
                    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

        def delta(self) -> Tensor:
            """ΔW = s · (w1_a w1_b) ⊙ (w2_a w2_b) `[out, in]`."""
            return (self.scale * (self.w1_a @ self.w1_b)) * (self.w2_a @ self.w2_b)
