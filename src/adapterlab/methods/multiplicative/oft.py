"""Orthogonal fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from adapterlab.core.codec import HFCodec
from adapterlab.methods.multiplicative import _peft_forms as forms
from adapterlab.methods.multiplicative._block_rotations import BlockRotation
from adapterlab.methods.multiplicative._rotations import cayley
from adapterlab.registry import register


@register
class OFT(BlockRotation):
    """Rotate the weight's rows, so that the angles between neurons stay those of pretraining.

    y = W Rᵀ x + b, R block-diagonal of rotations R_i = (I + Q_i)(I − Q_i)⁻¹ `[b, b]`, Q_i = U_i − U_iᵀ. U_i is zero but
    above the diagonal, and is what trains. The inverse is exact, and x is rotated instead of W.

    Variants: `share` has one block for all places. `eps` constrains: after each step Q_i is brought back to
    ‖Q_i‖ ≤ eps / √n for n blocks, so that ‖R − I‖ ≤ 2 eps (√places times that with `share`). `rescale` trains a factor
    s on each output as well, y = s ⊙ W Rᵀ x + b. `dropout` leaves single blocks out of a training step: R_i = I.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too), and embeddings, whose rows are rotated.

    Start: U = 0, so the first output equals the base's.

    Trainable parameters: in (b − 1) / 2 for each module, b (b − 1) / 2 with `share`, and out more with `rescale`.

    Inference: W Rᵀ can be merged, at no cost; singular values and the angles between rows are those of W.

    Several adapters on one module multiply, and their order counts.

    Cost of a step: 3 t in b operations for t tokens beside the layer's own, where turning W takes out · in · b and a
    gradient as large as W; for each block an inverse `[b, b]`.

    Rate: 8e-4, as in the runs of OFTv2 (arXiv 2506.19847), with 4e-4 to 8e-4 where LoRA has 2e-4.

    Reference: "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280.

    Example:
        >>> from adapterlab.methods.multiplicative.oft import OFT
        >>> OFT(block_size=24).size(48), OFT(blocks=4).size(48), OFT(uneven="nearest").size(48)
        (24, 12, 24)
    """

    hf: ClassVar[HFCodec | None] = HFCodec(
        "OFT",
        when={"use_cayley_neumann": False},
        fields={"block_size": "oft_block_size", "blocks": "r", "share": "block_share", "dropout": "module_dropout"},
        tensors={"v": {"linear": "oft_R.weight", "embedding": "oft_embedding_R.weight"}},
        older={"oft_r": "matrix", "oft_s": "scale"},
        accepts={"init_weights": (True, False), "bias": ("none",)},
        ignores=(*forms.READ, "num_cayley_neumann_terms"),
        derived=forms.derived,
        transposed=False,
        outward=forms.outward(turned=True, options={}),
        inward=forms.inward(turned=True),
    )

    def matrix(self, q: Tensor) -> Tensor:
        """R − I with R = (I + Q)(I − Q)⁻¹."""
        return cayley(q)
