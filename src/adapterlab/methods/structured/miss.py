"""Matrix shard sharing."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.codec import HFCodec
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.errors import AttachError
from adapterlab.methods.structured._rebuilt_updates import Rebuilt
from adapterlab.registry import register


@register
class MiSS(LayerMethod):
    """Let all shards of a weight share one small trained matrix, so that the input is summed before it is multiplied.

    y = W x + b + Dᵀ S, S_i = Σ_m x_{m r + i} `[r]` (x padded with zeros), D `[r, out]`: ΔW[o, j] = D[j mod r, o].

    Variants: `mini` repeats a D `[r, mini_r]` along the outputs. `bat` has a block D_p `[r, r]` for each r outputs and
    makes the update depend on the weight, whose r x r blocks become W_pq + W_pq D_p + D_p.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too).

    Start: D = 0, so the first output equals the base's; D has a gradient from the first step on.

    Trainable parameters: r out for each module; r mini_r with `mini`.

    Inference: W + ΔW can be merged, at no cost. Before, `bat` multiplies the whole weight by D at each call.

    Rate: 2e-5, as in the authors' runs on Llama 2: an entry of D moves in / r entries of W.

    Reference: "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", arXiv 2409.15371
    (first "Bone: Block-Affine Adaptation").

    Example:
        >>> from adapterlab.methods.structured.miss import MiSS
        >>> MiSS(r=16, variant="mini", mini_r=8).shape(96, 64)
        (16, 8)
    """

    formula: ClassVar[str] = "r out"

    r: int = Field(64, ge=1, description="length of a shard of the input, and largest rank of the update")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input; `bat` has none")
    variant: Literal["standard", "mini", "bat"] = Field("standard", description="shape of D and form of the update")
    mini_r: int = Field(1, ge=1, description="outputs after which D repeats, with variant='mini'")

    hf: ClassVar[HFCodec | None] = HFCodec(
        "MISS",
        fields={
            "r": "r",
            "dropout": "miss_dropout",
            "variant": ("init_weights", {"standard": True, "mini": "mini", "bat": "bat"}),
            "mini_r": "mini_r",
        },
        tensors={"block": "miss_block"},
        accepts={"init_weights": (False,), "bias": ("none",)},
        transposed=False,
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """A shard that fits into small layers."""
        return {"r": 8}

    def shape(self, out: int, in_: int) -> tuple[int, ...]:
        """Shape of D for a weight `[out, in]`.

        Raises:
            AttachError: the sizes do not divide as the variant needs.
        """
        if self.r > in_:
            raise AttachError(f"miss: r = {self.r} is more than the {in_} inputs of a target; choose r <= {in_}.")
        if self.variant == "mini" and out % self.mini_r:
            raise AttachError(
                f"miss: mini_r = {self.mini_r} does not divide the {out} outputs of a target. Choose a divisor, "
                "variant='standard', or exclude the target."
            )
        if self.variant == "bat" and (out % self.r or in_ % self.r):
            raise AttachError(
                f"miss: variant='bat' cuts a weight into blocks of r = {self.r}, and a target is [{out}, {in_}]. "
                "Choose an r that divides both, variant='standard', or exclude the target."
            )
        blocks = {"standard": (self.r, out), "mini": (self.r, self.mini_r), "bat": (out // self.r, self.r, self.r)}
        return blocks[self.variant]

    class Layer(Rebuilt):
        """D of one module, `block`."""

        def __init__(self, method: MiSS, site: Site):
            super().__init__(site)
            self.bat = method.variant == "bat"
            self.p = 0.0 if self.bat else method.dropout
            self.block = site.parameter(*method.shape(*site.shape))

        def delta(self) -> Tensor:
            """ΔW `[out, in]`."""
            out, in_ = self.site.shape
            if not self.bat:
                r, width = self.block.shape
                return self.block.T.repeat(out // width, -(-in_ // r))[:, :in_]
            r = self.block.shape[-1]
            # The weight before any merge: the update of another adapter is not multiplied.
            weight = self.site.unmerged.weight().detach().to(self.dtype)
            blocks = weight.reshape(out // r, r, in_ // r, r).transpose(1, 2)  # [p, q, r, r]
            d = self.block.unsqueeze(1)
            return (blocks @ d + d).transpose(1, 2).reshape(out, in_)

        def forward(self, x: Tensor) -> Tensor:
            """The update's share of the output, in the dtype of x."""
            if self.bat:
                return super().forward(x)
            r, width = self.block.shape
            x = F.dropout(F.pad(x, (0, -x.shape[-1] % r)), self.p, self.training)
            y = x.unflatten(-1, (-1, r)).sum(-2) @ self.block.to(x.dtype)
            return y if width == self.site.shape[0] else y.tile(self.site.shape[0] // width)
