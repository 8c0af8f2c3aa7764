"""Orthogonal fine-tuning with butterfly factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.errors import AttachError
from adapterlab.methods.multiplicative import _peft_forms as forms
from adapterlab.methods.multiplicative._rotations import Rotation, Turn, cayley, divisors, skew, width
from adapterlab.registry import register

_WIDEST = 128  # features of a block that factors are multiplied out to; beyond, a second pass over x costs less


def _outward(method: Any, layers: Mapping[str, Any]) -> forms.Made:
    """PEFT keeps whole matrices M with S = ½ (M − Mᵀ), and the factors themselves; ours are of Q = −S."""
    tensors = {p: {"v": -skew(layer.v, layer.size), "s": layer.s[:, None]} for p, layer in layers.items()}
    size = {"boft_block_size": 0} if method.blocks else {}
    # Where PEFT's extension cannot be built, it makes one factor, whatever was asked for.
    count = {len(layer.v) for layer in layers.values()}
    return {**size, "boft_n_butterfly_factor": max(count)}, tensors


def _inward(method: Any, site: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `_outward` for one module."""
    found = {"v": forms.from_matrix(tensors["v"])} if "v" in tensors else {}
    return found | ({"s": tensors["s"].flatten()} if "s" in tensors else {})


@register
class BOFT(LayerMethod):
    """Rotate the weight's rows by a product of sparse rotations wired like a butterfly, so that all inputs can mix.

    y = s ⊙ W Rᵀ x + b, R = F_{m−1} ⋯ F_0. Each F_i is block-diagonal of rotations (I + Q)(I − Q)⁻¹ `[b, b]` after a
    permutation: cut into half-blocks of b / 2 features, F_i joins pairs of them 2ⁱ apart. Q = U − Uᵀ; the U, zero but
    above the diagonal, and s train. m = 1 is OFT with factors of outputs; with m = 1 + log₂(in / b) R can be dense.

    `dropout`: in each training step one of the factors is drawn, and each of its blocks left out with this probability.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too). in is a multiple of b 2ᵐ⁻¹.

    Start: U = 0 and s = 1, so the first output equals the base's.

    Trainable parameters: m in (b − 1) / 2 + out for each module. PEFT's are m in b + out: it keeps whole matrices, of
    which the symmetric part does nothing.

    Inference: diag(s) W Rᵀ can be merged, at no cost.

    Cost of a step: the factors are multiplied out to blocks of c = 2ᵐ⁻¹ b features, up to 128, and x turned by
    them in 3 t in c operations for t tokens; beyond, by m / log₂(256 / b) passes of that kind. Products with
    permutation matrices and with a dense R, 2 m in³ and t in², are not made.

    Rate: 8e-4, as in the authors' runs of Llama-2-7B for mathematics.

    Reference: "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", arXiv 2311.06243.

    Example:
        >>> from adapterlab.methods.multiplicative.boft import BOFT
        >>> BOFT(block_size=4, factors=3).size(64), BOFT(blocks=8, factors=3).size(64)
        (4, 8)
    """

    formula: ClassVar[str] = "factors in (block_size - 1) / 2 + out"

    block_size: int = Field(8, ge=0, description="features b in a block of a factor; even with several factors")
    blocks: int = Field(0, ge=0, description="number of blocks in every target instead of their size; 0: by the size")
    factors: int = Field(2, ge=1, le=32, description="butterfly factors m; each doubles how many features mix")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="probability that a block of one factor, drawn anew, is left out of a training step",
    )

    hf: ClassVar[HFCodec | None] = HFCodec(
        "BOFT",
        fields={
            "block_size": "boft_block_size",
            "blocks": "boft_block_num",
            "factors": "boft_n_butterfly_factor",
            "dropout": "boft_dropout",
        },
        tensors={"v": "boft_R", "s": "boft_s"},
        accepts={"init_weights": (True, False), "bias": ("none",)},
        transposed=False,
        outward=_outward,
        inward=_inward,
    )

    @model_validator(mode="after")
    def _blocks_can_be_joined(self) -> Self:
        if not self.block_size and not self.blocks:
            raise ValueError("block_size = 0 and blocks = 0 leave the blocks open; set one of them, such as 8 features")
        if not self.blocks and self.factors > 1 and self.block_size % 2:
            raise ValueError(
                f"block_size = {self.block_size} cannot be halved, and {self.factors} factors join half-blocks; use "
                f"{self.block_size + 1} or factors = 1"
            )
        return self

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Blocks that fit narrow layers, and one factor, which PEFT makes on every machine."""
        return {"block_size": 4, "factors": 1}

    def size(self, features: int) -> int:
        """Features in a block of a module that has so many."""
        return features // self.blocks if self.blocks else self.block_size

    def fits(self, features: int, b: int) -> bool:
        """Say whether blocks of b features can be joined by all factors."""
        return b >= 2 and features % (b << self.factors - 1) == 0 and (self.factors == 1 or b % 2 == 0)

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the targets.

        Raises:
            AttachError: the blocks and factors do not divide the features of one.
        """
        sites = host.sites(self.targets, self.kinds)
        common = math.gcd(*(width(site) for site in sites))
        for site in sites:
            features = width(site)
            whole = not self.blocks or features % self.blocks == 0
            if not whole or not self.fits(features, self.size(features)):
                raise AttachError(self._unfit(site.path, features, common))
        super().attach(host, name)

    def _unfit(self, path: str, features: int, common: int) -> str:
        field, value = ("blocks", self.blocks) if self.blocks else ("block_size", self.block_size)
        fitting = [b for b in divisors(common) if self.fits(common, b)]
        choices = sorted(common // b if self.blocks else b for b in fitting)
        listed = f"{field}={', '.join(map(str, choices))} fit" if choices else f"No {field} fits"
        return (
            f"boft: {field}={value} with factors={self.factors} does not divide the {features} features of {path}, "
            f"which blocks of b and m factors need to be a multiple of b · 2^(m − 1). {listed} every target with these "
            "factors; or take fewer, or leave the module out."
        )

    def tensor_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Factors that start at one are not decayed."""
        return {"s": {"weight_decay": 0.0}}

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach with the number of factors that the tensors have: PEFT without its extension makes one of several."""
        found = {len(value) for key, value in tensors.items() if key.endswith(".v") and value.dim() == 3}
        actual = self if len(found) != 1 else self.replace(factors=found.pop())
        actual.attach(host, name)

    class Layer(Rotation):
        """The factors of one module, `v` `[m, n, b (b − 1) / 2]`, and those of its outputs, `s` `[out]`."""

        def __init__(self, method: BOFT, site: Site):
            super().__init__(site, scales=True)
            self.p = method.dropout
            self.size = method.size(width(site))
            blocks = width(site) // self.size
            self.v = site.parameter(method.factors, blocks, self.size * (self.size - 1) // 2)

        def turns(self) -> list[Turn]:
            """The factors in their order, as many as fit multiplied out into one step."""
            blocks = cayley(skew(self.v, self.size))
            if self.training and self.p:
                blocks = blocks * self.left(blocks)
            together = 1 + int(math.log2(max(_WIDEST // self.size, 1)))
            groups = range(0, len(blocks), together)
            return [multiplied_out(blocks[i : i + together], i) for i in reversed(groups)]

        def left(self, blocks: Tensor) -> Tensor:
            """Zeros for the blocks of one factor that are left out `[m, n, 1, 1]`."""
            count, places = blocks.shape[:2]
            drawn = torch.rand(count, places, device=blocks.device) >= self.p
            others = torch.arange(count, device=blocks.device) != torch.randint(count, (), device=blocks.device)
            return (drawn | others[:, None])[..., None, None]


def multiplied_out(factors: Tensor, first: int) -> Turn:
    """Multiply neighbouring factors into one step.

    Factors i to i + k − 1 mix half-blocks that are equal in all but k bits of their number, from bit i on. Their
    product is block-diagonal with pieces of half a block, 2ⁱ pieces apart.

    Args:
        factors: R − I of the blocks of k factors `[k, n, b, b]`.
        first: i.
    """
    k, n, b, _ = factors.shape
    if k == 1 and not first:
        return Turn(factors[0])
    half, stride = b // 2, 1 << first
    groups = n * b // (half * stride << k)
    whole = factors + torch.eye(b, dtype=factors.dtype, device=factors.device)
    # What the last factors, which come first, make of half-blocks: bits that they have not come to are as they were.
    product = whole[-1].reshape(groups, 1 << k - 1, stride, b, b)
    for i in reversed(range(k - 1)):
        done, apart = 1 << k - 1 - i, 1 << i
        before = product.reshape(groups, 2, apart, stride, done, half, done, half)
        factor = whole[i].reshape(groups, done, apart, stride, 2, half, 2, half)
        after = torch.einsum("gbaskhcm,gcasbmdn->gaskbhcdn", before, factor)
        product = after.reshape(groups, apart, stride, 2 * done * half, 2 * done * half)
    eye = torch.eye(product.shape[-1], dtype=factors.dtype, device=factors.device)
    return Turn((product - eye).flatten(0, 2), stride, half)
