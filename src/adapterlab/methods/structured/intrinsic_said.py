"""Structure-aware intrinsic dimension."""

from __future__ import annotations

import math
import zlib
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.errors import AttachError
from adapterlab.methods.structured._rebuilt_updates import Rebuilt
from adapterlab.ops.hadamard import walsh_hadamard
from adapterlab.registry import register


@register
class IntrinsicSAID(LayerMethod):
    """Train one vector of d numbers that fixed random projections expand to updates of all weights.

    θ_i = θ_i⁰ + λ_i · P_i(v) for each weight and bias θ_i, of D elements; P_i(v) = (H G Π H B v)[:D] / norm (Fastfood),
    v padded with zeros, or cropped, to L = the next power of two, B random signs, H the Walsh-Hadamard transform, Π a
    permutation, G normal, norm = √(L ΣG²) √(D / L), so that ‖P_i(v)‖ ≈ ‖v‖. v is shared by all, λ_i is learned for
    each; without `structure_aware` (DID) it is 1. A weight that two modules share has one projection.

    Where it attaches: weights and biases of linear layers (GPT-2's `Conv1D` and quantized ones too) and embeddings. The
    paper takes the whole model; embedding tables would take most of the time.

    Start: v = 0 and λ = 1, so the first output equals the base's.

    Trainable parameters: d, for all modules together: v has what λ leaves of it.

    Inference: W + λ P(v) can be merged, at no cost. The file holds v and λ; `seed` gives the projections again.

    Updates are built for each call, n log n each, and without `keep_projections` again for the backward pass.

    Cost of a step: a transform of L numbers for each tensor and another for its gradient, L log₂ L each however few the
    tokens, and three products with ΔW, 6 t out in operations; LoRA's large products are 4 t out in.

    Rate: 3e-2, as in a public reimplementation for T5: v wants large rates.

    Reference: "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning", arXiv 2012.13255.

    Example:
        >>> from adapterlab.methods.structured.intrinsic_said import IntrinsicSAID
        >>> IntrinsicSAID(d=200, targets=["q", "v"]).d
        200
    """

    formula: ClassVar[str] = "d, for all modules together"
    derived: ClassVar[float] = 8.0  # signs and permutations of every weight, padded to powers of two
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding")

    d: int = Field(20000, ge=1, description="number of trained values, the scales among them")
    structure_aware: bool = Field(True, description="learn a scale for each weight and bias")
    seed: int = Field(0, ge=0, description="of the random projections")
    keep_projections: bool = Field(
        True,
        description="hold the projections in memory, 8 to 16 bytes a weight, and the updates until the backward pass; "
        "else draw and build them anew at each use",
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """As many values as small layers can see."""
        return {"d": 500}

    def attach(self, host: Carrier, name: str) -> None:
        """Share v, then wrap the targets."""
        sites = host.sites(self.targets, self.kinds)
        tensors = {id(p) for site in sites for p in (site.module._parameters["weight"], site.bias) if p is not None}
        length = self.d - (len(tensors) if self.structure_aware else 0)
        if length < 1:
            raise AttachError(
                f"intrinsic_said: d = {self.d} leaves nothing for the shared vector, since {len(tensors)} weights and "
                f"biases have a scale each. Choose d > {len(tensors)}, fewer targets, or structure_aware=False."
            )
        vector = host.share(name, "vector", _Vector(sites[0], length))
        owners: dict[int, IntrinsicSAID.Layer] = {}
        for site in sites:
            layer = self.Layer(self, site, length)
            layer.refer("vector", vector)
            layer.refer("owner", owners.setdefault(id(site.module._parameters["weight"]), layer))
            if layer.owner is not layer:
                del layer.weight_scale, layer.weight_map
            host.wrap(name, site, layer)

    class Layer(Rebuilt):
        """The projections of one module's weight and bias, and their scales.

        Attributes:
            vector: v, which all modules share.
            owner: the first module that has this weight, which gives projection and scale.
        """

        vector: _Vector
        owner: IntrinsicSAID.Layer

        def __init__(self, method: IntrinsicSAID, site: Site, width: int):
            super().__init__(site)
            out, in_ = site.shape
            keep, self.again = method.keep_projections, not method.keep_projections
            self.weight_map = Fastfood(out * in_, width, _seed(method.seed, f"{site.path}.weight"), site, keep)
            self.weight_scale = _one(site) if method.structure_aware else None
            self.bias_map = self.bias_scale = None
            if site.bias is not None:
                self.bias_map = Fastfood(out, width, _seed(method.seed, f"{site.path}.bias"), site, keep)
                self.bias_scale = _one(site) if method.structure_aware else None

        @property
        def dtype(self) -> torch.dtype:
            """That of v."""
            return self.vector.v.dtype

        def delta(self) -> Tensor:
            """ΔW `[out, in]`."""
            out, in_ = self.site.shape
            flat = self.project(self.owner.weight_map, self.owner.weight_scale)
            # The projection fills the weight as it is stored.
            return (
                flat.view(out, in_)
                if self.site.kind == "linear" and not self.site.transposed
                else flat.view(in_, out).T
            )

        def shift(self) -> Tensor | None:
            """The update of the bias `[out]`, or None without a bias."""
            return None if self.bias_map is None else self.project(self.bias_map, self.bias_scale)

        def project(self, projection: Fastfood, scale: Tensor | None) -> Tensor:
            """λ P(v)."""
            v = self.vector.v.to(self.site.device)
            return projection(v if scale is None else scale * v)

        def sources(self) -> list[Tensor]:
            """V and the scale of the weight."""
            scale = self.owner.weight_scale
            return [self.vector.v] if scale is None else [self.vector.v, scale]

        def forward(self, x: Tensor) -> Tensor:
            """The update's share of the output, that of the bias too."""
            y, shift = super().forward(x), self.shift()
            return y if shift is None else y + shift.to(y.dtype)

        def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            """W + ΔW and the shifted bias."""
            weight, bias = super().merged(weight, bias)
            shift = self.shift()
            return weight, bias if shift is None or bias is None else bias + shift.to(bias.dtype)


class Fastfood(nn.Module):
    """P: a fixed random map `[width]` -> `[size]` that keeps norms, on average, in n log n steps.

    Behind the `width` numbers stand zeros, so H B v repeats what the transform of its first part is. Signs, permutation
    and normal values are drawn on the CPU, so that a seed gives the same ones on every device.
    """

    signs: Tensor
    order: Tensor
    gain: Tensor

    def __init__(self, size: int, width: int, seed: int, site: Site, keep: bool):
        """Choose the map.

        Args:
            size: elements of the result.
            width: of what it is given.
            seed: of what is random.
            site: gives device and dtype.
            keep: hold what is random in memory.
        """
        super().__init__()
        self.size, self.seed = size, seed
        self.length = 1 << (size - 1).bit_length()
        self.part = min(self.length, 1 << (width - 1).bit_length())
        self.kept = keep
        if keep:
            for key, value in zip(("signs", "order", "gain"), self.draw(site.device, site.dtype), strict=True):
                self.register_buffer(key, value, persistent=False)

    def draw(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Draw B `[part]`, Π `[length]` as places in the part, and G `[length]` with the norm put into it."""
        draw, n = torch.Generator().manual_seed(self.seed), self.length
        signs = torch.randint(0, 2, (n,), generator=draw, dtype=torch.int8) * 2 - 1
        order = torch.randperm(n, generator=draw, dtype=torch.int32)
        normal = torch.randn(n, generator=draw)
        norm = math.sqrt(n * float(normal.double().square().sum()) * self.size / n)
        signs, order = signs[: self.part].clone(), order.bitwise_and_(self.part - 1)
        return signs.to(device), order.to(device), (normal / norm).to(device, dtype)

    def forward(self, v: Tensor) -> Tensor:
        """P(v)."""
        signs, order, gain = (self.signs, self.order, self.gain) if self.kept else self.draw(v.device, v.dtype)
        v = F.pad(v[: self.part], (0, max(0, self.part - len(v))))
        h = walsh_hadamard(signs * v).index_select(0, order)
        return walsh_hadamard(gain * h)[: self.size]


class _Vector(nn.Module):
    def __init__(self, site: Site, length: int):
        super().__init__()
        self.v = site.parameter(length)


def _one(site: Site) -> nn.Parameter:
    return nn.Parameter(torch.ones_like(site.parameter(1)))


def _seed(seed: int, path: str) -> int:
    """A seed for one tensor that does not depend on which others there are."""
    return (seed << 32) + zlib.crc32(path.encode())
