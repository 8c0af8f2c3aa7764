"""Weight-decomposed low-rank adaptation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from adapterlab.core.adapter import Tokenwise
from adapterlab.core.codec import HFCodec
from adapterlab.core.kept import Kept
from adapterlab.core.site import Site
from adapterlab.engine.fusion import Base, may_fuse
from adapterlab.methods.low_rank import _peft_forms as _lora_forms
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.structured._convolutions import along_channels
from adapterlab.ops.magnitude import magnitude_linear, row_norms, row_squares
from adapterlab.registry import register


def _outward(method: Any, layers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """As LoRA's; PEFT keeps the m of a convolution in the shape of its output `[1, out, 1, 1]`."""
    made = _lora_forms.outward(method, layers)
    for path, tensors in made[1].items() if made is not None else ():
        site = layers[path].site
        if site.kind == "conv":
            tensors["m"] = along_channels(site, tensors["m"])[None]
    return made


def _inward(method: Any, site: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `_outward` for one module."""
    tensors = _lora_forms.inward(method, site, tensors)
    if site.kind == "conv" and "m" in tensors:
        tensors["m"] = tensors["m"].flatten()
    return tensors


@register
class DoRA(LoRA):
    """Split the weight into the norms of its rows and their directions; learn the norms, and the directions with LoRA.

    y = m/c ⊙ (W + s B A) x + b, where c holds the norms of the rows of W + s B A. c follows A and B, but no gradient
    flows through it. With dropout, x̃ = drop(x) and g = m/c: y = W x + b + (g − 1) ⊙ W x̃ + g ⊙ s B A x̃.
    A `[r, in]`, B `[out, r]`, m `[out]`, s as in LoRA. For an embedding table the norms run over the vocabulary.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too), embeddings, and convolutions, where a
    row holds the whole kernel of an output channel. The paper adapts the query, key, value, up and down projections,
    often at half of LoRA's rank.

    Start: B = 0 (for embeddings A = 0) and m = the norms of the rows of W, unpacked if it is quantized, so the first
    output equals the base's.

    Trainable parameters: r (in + out) + out for each module.

    Inference: diag(m/c) (W + s B A) can be merged, at no cost. Unmerged, c is computed once and kept until A, B or W
    change (writes through `.data` go unseen until the next `train()`).

    Several DoRA adapters on one module do not add up: each rescales what the ones attached before it computed, and
    takes c from the base's own weight.

    Rate: 2e-4, as in the authors' runs on LLaMA-7B, a little less than LoRA's.

    Reference: "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.

    Example:
        >>> from adapterlab.methods.low_rank.dora import DoRA
        >>> DoRA(r=4, targets=["q", "v"]).scaling("model.layers.0.self_attn.q_proj")
        4.0
    """

    formula: ClassVar[str] = "r (in + out) + out"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "conv")

    lora_bias: Literal[False] = Field(False, description="not available: a bias of B has no place in the row norms")

    _lora: ClassVar[HFCodec] = cast(HFCodec, LoRA.hf)
    hf: ClassVar[HFCodec | None] = replace(
        _lora,
        tensors={**_lora.tensors, "m": "lora_magnitude_vector"},
        when={"use_dora": True},
        outward=_outward,
        inward=_inward,
    )

    class Layer(LoRA.Layer):
        """The two factors and the row norms at one module."""

        shares_base: ClassVar[bool] = True

        def __init__(self, method: LoRA, site: Site):
            super().__init__(method, site)
            self.kept = Kept()
            self.m = site.parameter(site.shape[0])
            with torch.no_grad():
                self.m.copy_(self.norms())

        def norms(self, unpacked: Tensor | None = None) -> Tensor:
            """C: the norms of the rows of W + s B A `[out]`; kept between calls outside of training.

            Args:
                unpacked: W, if the caller has unpacked it already.
            """
            # The weight before any merge: a norm that took in another adapter would change what this one computes.
            site = self.site.unmerged
            weight: Any = site.module._parameters["weight"]

            def compute() -> Tensor:
                # What writes past autograd into trained tensors, as some optimizers do, must not spoil what is kept.
                frozen = not weight.requires_grad and not torch.compiler.is_compiling()
                matrix = site.weight() if unpacked is None else unpacked
                dtype = torch.promote_types(self.dtype, torch.float32)
                squares = self.kept.once("squares", lambda: row_squares(matrix, dtype), weight) if frozen else None
                return row_norms(matrix, self.A, self.B, self.scale, squares)

            if self.training or torch.compiler.is_compiling():
                return compute()
            return self.kept.once("norms", compute, self.A, self.B, weight, given=self.scale)

        def train(self, mode: bool = True) -> Self:
            """Switch between training and evaluation; forget the norms."""
            self.kept.clear()
            return super().train(mode)

        def around(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Rescale the base's product and the update's, the bias left out."""
            # Dropout makes W x̃ a second product with the base.
            alone = not (self.training and self.p) and self.site.unmerged is self.site
            if isinstance(run, Base) and alone and may_fuse(self, x):
                weight, *again = self.site.frozen_weight(x.dtype)
                gain = self.m / self.norms(weight)
                return magnitude_linear(x, weight, self.site.bias, self.A, self.B, self.scale, gain, *again)
            gain = self.m / self.norms()
            y: Tensor = run(x, *args, **kwargs)
            inner = y
            if self.training and self.p:
                x = F.dropout(x, self.p)
                inner = run(x, *args, **kwargs)
            bias = self.site.unmerged.bias
            inner = inner if bias is None else inner - along_channels(self.site, bias.to(y.dtype))
            gain = along_channels(self.site, gain)
            # The gain enters as its difference from one: a small change survives in a half-precision dtype.
            change = (gain - 1).to(y.dtype)
            return y + change * inner + gain.to(y.dtype) * self.product(x).to(y.dtype)

        def serving(self) -> Tokenwise:
            """The update, and m/c as gain; the base's bias is not rescaled."""
            gain, bias = self.m / self.norms(), self.site.unmerged.bias
            return Tokenwise(self.A, self.B, self.scale, gain=gain, shift=None if bias is None else (1 - gain) * bias)

        def slow_because(self) -> str:
            """As LoRA's; dropout and what is merged stand against it too."""
            if self.p or self.site.unmerged is not self.site:
                return "dropout" if self.p else "another adapter is merged"
            return self.site.why_apart()

        def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            """Diag(m/c) (W + s B A); the base's own bias is not rescaled."""
            gain = (self.m / self.norms()).to(weight.dtype)
            own = self.site.unmerged.bias
            if bias is not None:
                fixed = bias.new_zeros(()) if own is None else own.to(bias.dtype)
                bias = fixed + gain * (bias - fixed)
            return gain[:, None] * (weight + self.delta().to(weight.dtype)), bias
