"""Fourier transform fine-tuning."""

from __future__ import annotations

import functools
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import LayerMethod
from adapterlab.core.patterns import Pattern, check_patterns, look_up
from adapterlab.core.site import Site
from adapterlab.errors import AttachError
from adapterlab.methods.structured._rebuilt_updates import Rebuilt
from adapterlab.ops.fourier import Entries, few_tokens, spectral_matrix, spectral_product, symmetric_entries
from adapterlab.ops.low_rank import autocasts
from adapterlab.registry import register


@register
class FourierFT(LayerMethod):
    """Learn a few Fourier coefficients of the weight's update, at random frequencies.

    y = W x + b + ΔW x, ΔW = alpha · Re(ifft2(F)), F `[out, in]` zero but for n trained real values at fixed random
    places; ifft2 divides by out · in. ΔW has full rank. What it adds to a token is the transform of a sparse product
    with the token's own transform; for more tokens than a layer is wide, it is built for the call and again for the
    backward pass.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too).

    Start: values N(0, 1) as in the paper, which changes the model from the start; `start="zeros"` equals the base.

    Trainable parameters: n for each module.

    Inference: W + ΔW can be merged, at no cost. The places are not saved: `seed` gives them again.

    The update's size is about alpha √(n / (2 out in)): small layers need a smaller alpha.

    Cost of a step: five FFTs of the tokens in float32 and three products with 2 n entries, about 5 t (2 out log₂ out +
    3 in log₂ in) + 12 n t operations for t tokens; LoRA's large products are 4 t out in. For more tokens than 2 out in
    / (out + in): three FFTs of out · in numbers and three products with ΔW, 6 t out in.

    Rate: 5e-2, as in the authors' scripts for Llama 2; those for GLUE have 4e-2 to 1.2e-1.

    Reference: "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", arXiv 2405.03003.

    Example:
        >>> from adapterlab.methods.structured.fourierft import FourierFT
        >>> FourierFT(n=500, n_pattern={"v_proj": 100}).count("model.layers.0.self_attn.v_proj")
        100
    """

    formula: ClassVar[str] = "n"
    starts_at_base: ClassVar[bool] = False

    n: int = Field(1000, ge=1, description="trained values for each module")
    alpha: float = Field(150.0, gt=0, description="factor on the update; 300 for layers of 4096")
    seed: int = Field(777, ge=0, lt=1 << 63, description="of the random places; the same in all layers of one shape")
    start: Literal["normal", "zeros"] = Field("normal", description="values to start from: N(0, 1), or the base itself")
    n_pattern: dict[Pattern, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="other n for modules whose path ends in a match of the key"
    )

    hf: ClassVar[HFCodec | None] = HFCodec(
        "FOURIERFT",
        fields={
            "n": "n_frequency",
            "alpha": "scaling",
            "seed": "random_loc_seed",
            "start": ("init_weights", {"normal": False, "zeros": True}),
            "n_pattern": "n_frequency_pattern",
        },
        tensors={"spectrum": "fourierft_spectrum"},
        accepts={"bias": ("none",)},
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Fewer values than a small layer has entries, and a factor to match."""
        return {"n": 64, "alpha": 20.0}

    def count(self, path: str) -> int:
        """Number of trained values at one module."""
        return look_up(self.n_pattern, path, self.n)

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the targets.

        Raises:
            TargetError: a pattern matches none of them.
        """
        super().attach(host, name)
        check_patterns(self.id, {"n_pattern": self.n_pattern}, host.adapters(name))

    class Layer(Rebuilt):
        """The coefficients `spectrum` `[n]` of one module."""

        def __init__(self, method: FourierFT, site: Site):
            super().__init__(site)
            out, in_ = site.shape
            n = method.count(site.path)
            if n > out * in_:
                raise AttachError(
                    f"fourierft: {site.path} has {out} x {in_} = {out * in_} frequencies, fewer than n = {n}. Lower n, "
                    f"or n_pattern={{{site.path.rpartition('.')[2]!r}: ...}} for this module, or exclude it."
                )
            self.alpha, self.shape = method.alpha, (out, in_)
            self.spectrum = site.parameter(n)
            if method.start == "normal":
                nn.init.normal_(self.spectrum)
            both = symmetric_entries(places(out, in_, n, method.seed), out, in_)
            for side, entries in zip(("row", "column"), both, strict=True):
                for field, tensor in entries._asdict().items():
                    self.register_buffer(f"{side}_{field}", tensor.to(site.device), persistent=False)

        def entries(self, side: str) -> Entries:
            """The places of the values and of their mirror images, by "row" or by "column"."""
            return Entries(*(self.get_buffer(f"{side}_{field}") for field in Entries._fields))

        def delta(self) -> Tensor:
            """ΔW = alpha · Re(ifft2(F)) `[out, in]`."""
            return spectral_matrix(self.alpha * self.spectrum, self.entries("row"), self.shape[1])

        def forward(self, x: Tensor) -> Tensor:
            """The update's share of the output, for few tokens without ΔW; a compiler makes more of the matrix."""
            few = few_tokens(x.numel() // x.shape[-1], *self.shape)
            if not few or torch.compiler.is_compiling() or autocasts(x):
                return super().forward(x)
            return spectral_product(x, self.alpha * self.spectrum, self.entries("row"), self.entries("column"))


@functools.lru_cache(maxsize=64)
def places(out: int, in_: int, n: int, seed: int) -> Tensor:
    """Draw n places in a spectrum `[out, in]`: flat row-major positions `[n]`."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randperm(out * in_, generator=draw, device="cpu")[:n].clone()
