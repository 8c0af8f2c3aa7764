"""Low-rank Kronecker product adaptation."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.codec import HFCodec
from adapterlab.core.site import Site
from adapterlab.methods.structured._convolutions import kernel, tucker
from adapterlab.methods.structured._kronecker import Factor, KroneckerLayer, split
from adapterlab.methods.structured._lycoris import FIELDS, Lycoris, LycorisLayer, inward, outward
from adapterlab.methods.structured._rebuilt_updates import Rebuilt
from adapterlab.registry import register


@register
class LoKr(Lycoris):
    """Learn an additive update that is the Kronecker product of a small matrix and a larger one of low rank.

    y = W x + b + s · (w1 ⊗ w2) x, s = alpha / r, w1 `[out_l, in_m]`, w2 `[out_k, in_n]`, out = out_l out_k and
    in = in_m in_n. w2 is w2_a w2_b, `[out_k, r]` and `[r, in_n]`, while r is below half its larger side, else one
    matrix; w1 likewise with `decompose_both`, else one matrix. The product is never formed on linear layers.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too) and convolutions, where `in` above is
    the number of channels of a kernel, and w2 has the axes of the kernel as well: `[out_k, in_n, *k]`, w2_b
    `[r, in_n · prod(k)]`. With `effective_conv` a w2 of low rank is that of a core t2 `[r, r, *k]` with `[r, out_k]`
    and `[r, in_n]`.

    Start: w1 = 0 (or w1_a), or with `start="lycoris"` w2 = 0 (or w2_b), so the first output equals the base's.

    Trainable parameters: |w1| + |w2|, out_l in_m + out_k in_n or r (out_k + in_n) for each module.

    Inference: W + s w1 ⊗ w2 can be merged, at no cost.

    LyCORIS itself scales by 1 when both factors are whole matrices: give alpha = r for the same.

    Rate: 5e-4, LoRA's.

    Reference: "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", arXiv 2309.14859.

    Example:
        >>> from adapterlab.methods.structured.lokr import LoKr
        >>> LoKr(factor=4).sizes(96, 60)
        ((4, 4), (24, 15))
    """

    formula: ClassVar[str] = "|w1| + |w2|"

    factor: int = Field(-1, ge=-1, description="size of w1 where it divides, else its limit; -1: near the square root")
    decompose_both: bool = Field(False, description="make w1 a product of thin matrices too")
    rescale: bool = Field(False, description="divide by the share of rows that rank_dropout keeps")
    start: Literal["peft", "lycoris"] = Field("peft", description="what begins at zero: w1 or w2")

    hf: ClassVar[HFCodec | None] = HFCodec(
        "LOKR",
        fields={
            **FIELDS,
            "factor": "decompose_factor",
            "decompose_both": "decompose_both",
            "rescale": "rank_dropout_scale",
            "start": ("init_weights", {"peft": True, "lycoris": "lycoris"}),
        },
        tensors={key: f"lokr_{key}" for key in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
        accepts={"init_weights": (False,)},
        transposed=False,
        outward=outward,
        inward=inward,
    )

    def sizes(self, out: int, in_: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of w1 and w2 for a weight `[out, in]`."""
        (out_l, out_k), (in_m, in_n) = split(out, self.factor), split(in_, self.factor)
        return (out_l, in_m), (out_k, in_n)

    class Layer(LycorisLayer, KroneckerLayer, Rebuilt):
        """The factors of one module."""

        def __init__(self, method: LoKr, site: Site):
            super().__init__(method, site, method.rescale)
            (out, in_), axes = site.shape, kernel(site)
            first, second = method.sizes(out, in_ // math.prod(axes))
            r = method.rank(site.path)
            self.names = (
                self._make("w1", first, r if method.decompose_both else None),
                self._make("w2", second, r, axes, method.core(site)),
            )
            zero = self.names[0][0] if method.start == "peft" else self.names[1][-1]
            nn.init.zeros_(self.get_parameter(zero))

        def _make(
            self,
            name: str,
            shape: tuple[int, int],
            r: int | None,
            axes: tuple[int, ...] = (),
            core: tuple[int, ...] | None = None,
        ) -> tuple[str, ...]:
            """Make one factor, in thin matrices and perhaps a core where that is smaller; returns their names."""
            made: dict[str, tuple[int, ...]]
            if r is None or r >= max(shape) / 2:
                made = {name: (*shape, *axes)}
            elif core is None:
                made = {f"{name}_a": (shape[0], r), f"{name}_b": (r, shape[1] * math.prod(axes))}
            else:
                made = {"t2": core, f"{name}_a": (r, shape[0]), f"{name}_b": (r, shape[1])}
            for key, size in made.items():
                self.register_parameter(key, self.site.parameter(*size))
                nn.init.kaiming_uniform_(self.get_parameter(key), a=math.sqrt(5))
            return tuple(made)

        def sides(self) -> tuple[Factor, Factor]:
            """The matrices whose products are w1 and w2."""
            first, second = ([self.get_parameter(name) for name in names] for names in self.names)
            return first, [tucker(*second)] if len(second) == 3 else [matrix.flatten(1) for matrix in second]

        def forward(self, x: Tensor) -> Tensor:
            """The update's share of the output; on convolutions the product is formed, and built again backward."""
            share: Tensor = Rebuilt.forward(self, x) if kernel(self.site) else KroneckerLayer.forward(self, x)
            return share
