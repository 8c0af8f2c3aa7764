"""Orthogonal fine-tuning made scalable, on quantized bases too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from adapterlab.core.codec import HFCodec
from adapterlab.methods.multiplicative import _peft_forms as forms
from adapterlab.methods.multiplicative._block_rotations import BlockRotation
from adapterlab.methods.multiplicative._rotations import series
from adapterlab.registry import register


def _derived(config: Mapping[str, Any]) -> dict[str, Any]:
    """As of every block rotation; PEFT 0.18 halved the last term, and configurations name the version since then."""
    return {**forms.derived(config), "last": "half" if forms.version(config) >= (0, 18) else "whole"}


def _outward(method: Any, layers: Mapping[str, Any]) -> forms.Made | None:
    """As of every block rotation; the version says which series is meant."""
    return forms.outward(turned=False, options={"peft_version": "0.18.0"})(method, layers) if method.halved else None


@register
class OFTv2(BlockRotation):
    """Rotate the input by blocks made without an inverse, which works on a base in four or eight bits as it is (QOFT).

    y = W Rᵀ x + b, R block-diagonal of R_i = I + 2 Q_i + 2 Q_i² + … + Q_iᵏ⁻¹ `[b, b]`, the first k terms of
    (I + Q_i)(I − Q_i)⁻¹; Q_i = U_i − U_iᵀ. U_i is zero but above the diagonal, and is what trains. The last of k ≥ 4
    terms counts half (of k = 3 there are those of k = 4, of k = 2 it is I + 2 Q), as in PEFT since 0.18.

    R is a rotation while Q is small: ‖RᵀR − I‖ at k = 5 is 2e-4 for ‖Q‖ = 0.1, 0.02 for 0.3 and 0.1 for 0.5. With an
    even k it is far less, 1e-6, 7e-4 and 0.02 at k = 4, since the odd powers of Q cancel. `error()` of a layer measures
    it. Where it grows take an even k, more terms, a smaller rate, `eps`, or `oft`.

    Variants: `share`, `eps`, `rescale` and `dropout` as in `oft`.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too), and embeddings, whose rows are rotated.

    Start: U = 0, so the first output equals the base's.

    Trainable parameters: in (b − 1) / 2 for each module, b (b − 1) / 2 with `share`, and out more with `rescale`.

    Inference: W Rᵀ can be merged, at no cost; into a quantized base with quantized="dequantize".

    Cost of a step: 3 t in b operations for t tokens beside the layer's own.

    Rate: 8e-4, as in the authors' runs of GSM8K, with 4e-4 to 8e-4 where LoRA has 2e-4.

    Reference: "Orthogonal Finetuning Made Scalable", arXiv 2506.19847.

    Example:
        >>> from adapterlab.methods.multiplicative.oftv2 import OFTv2
        >>> OFTv2(terms=5).factors, OFTv2(terms=5, last="whole").factors, OFTv2(terms=2).factors
        ((2.0, 2.0, 2.0, 1.0), (2.0, 2.0, 2.0, 2.0), (2.0,))
    """

    terms: int = Field(5, ge=2, description="terms k of the series; more keep larger rotations orthogonal")
    last: Literal["half", "whole"] = Field(
        "half", description="the last term counts half of the others, or as they do: PEFT's series before 0.18"
    )

    hf: ClassVar[HFCodec | None] = HFCodec(
        "OFT",
        when={"use_cayley_neumann": True},
        fields={
            "block_size": "oft_block_size",
            "blocks": "r",
            "share": "block_share",
            "dropout": "module_dropout",
            "terms": "num_cayley_neumann_terms",
        },
        tensors={"v": {"linear": "oft_R.weight", "embedding": "oft_embedding_R.weight"}},
        accepts={"init_weights": (True, False), "bias": ("none",)},
        ignores=forms.READ,
        derived=_derived,
        transposed=False,
        outward=_outward,
        inward=forms.inward(turned=False),
    )

    @property
    def halved(self) -> bool:
        """Whether the last term counts half."""
        return self.last == "half" or self.terms == 2

    @property
    def factors(self) -> tuple[float, ...]:
        """What the powers of Q from the first on are multiplied by."""
        if self.last == "whole" or self.terms == 2:
            return (2.0,) * (self.terms - 1)
        return (*(2.0,) * (max(self.terms, 4) - 2), 1.0)

    def matrix(self, q: Tensor) -> Tensor:
        """R − I by the first terms of the series."""
        return series(q, self.factors)
