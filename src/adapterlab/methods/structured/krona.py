"""Kronecker adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.core.state import State
from adapterlab.core.targets import Targets
from adapterlab.errors import AttachError
from adapterlab.methods.bottleneck._bottleneck import Tap, entrance, feed_forwards, first, plus, width_of
from adapterlab.methods.structured._kronecker import Factor, KroneckerLayer, kronecker_linear, split
from adapterlab.registry import register


@register
class KronA(LayerMethod):
    """Learn an additive update that is the Kronecker product of two small matrices: full rank from few parameters.

    y = W x + b + s · (A ⊗ B) x, A `[a1, a2]`, B `[b1, b2]`, a1 b1 = out, a2 b2 = in. The product is never formed: x as
    rows X `[a2, b2]` gives A X Bᵀ.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too) and embeddings. With `place="block"`
    (KronA^B) beside the feed-forward sublayer, FFN(x) + s (A ⊗ B) x, and with `place="block_residual"` (KronA^B_res)
    with a learned t: FFN(x) + s (A ⊗ B) x + t x; there `targets` is not used.

    Start: A uniform ±1/√a2, B = 0 and t = 0, so the first output equals the base's.

    Trainable parameters: a₁ a₂ + b₁ b₂ for each module, at best about 2 √(out in); 1 more with t.

    Inference: beside linear layers W + s A ⊗ B can be merged, at no cost; beside a block it stays an adapter.

    LoKr with `r` of at least half the larger sides is the same update where its factor rule gives the same sizes.

    Rate: 5e-4, LoRA's; the authors' code is not public.

    Reference: "KronA: Parameter Efficient Tuning with Kronecker Adapter", arXiv 2212.10650.

    Example:
        >>> from adapterlab.methods.structured.krona import KronA
        >>> KronA().sizes(64, 96), KronA(a=(32, 8)).sizes(64, 96)
        (((8, 8), (8, 12)), ((32, 8), (2, 12)))
    """

    formula: ClassVar[str] = "a₁ a₂ + b₁ b₂"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding")

    a: tuple[int, int] | None = Field(
        None, description="shape (a1, a2) of A; by default the largest divisors up to the square roots of out and in"
    )
    scale: float = Field(1.0, gt=0, description="factor s")
    place: Literal["weight", "block", "block_residual"] = Field(
        "weight", description="beside each target's weight, or beside the feed-forward sublayer, with a residual or not"
    )

    hf: ClassVar[HFCodec | None] = HFCodec(
        "LOKR",  # PEFT's LoKr with two whole matrices; what it writes is read as LoKr
        fields={},
        tensors={"A": "lokr_w1", "B": "lokr_w2"},
        outward=lambda method, layers: _outward(method, layers),
    )

    def sizes(self, out: int, in_: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B for a weight `[out, in]`.

        Raises:
            AttachError: A does not divide it.
        """
        a1, a2 = self.a or (split(out)[0], split(in_)[0])
        if a1 < 1 or a2 < 1 or out % a1 or in_ % a2:
            near = math.gcd(a1, out), math.gcd(a2, in_)
            raise AttachError(
                f"krona: a = {(a1, a2)} does not divide a target of [{out}, {in_}]; a = {near} does. Choose other "
                "sizes, leave a unset to choose them by module, or exclude the target."
            )
        return (a1, a2), (out // a1, in_ // a2)

    def attach(self, host: Carrier, name: str) -> None:
        """Stand beside the targets, or beside the feed-forward sublayers."""
        if self.place == "weight":
            return super().attach(host, name)
        if "targets" in self.model_fields_set and self.targets != Targets(include=("all-linear",)):
            raise AttachError(
                f"krona: place={self.place!r} stands beside the feed-forward sublayers, so targets="
                f"{list(self.targets.include)} has no meaning. Leave targets unset, or choose place='weight'."
            )
        sites = host.all_sites()
        for site in feed_forwards(sites):
            key = None
            if site.kind == "linear":  # the sublayer has no module of its own: its input is found at the first one
                begin, key = entrance(site, sites), f"{name}:{site.path}"
                host.wrap(name, begin, Tap(begin, host.state, key))
            host.wrap(name, site, Beside(self, site, width_of(site, sites), host.state, key))

    class Layer(KroneckerLayer):
        """A and B of one module."""

        def __init__(self, method: KronA, site: Site):
            super().__init__(site)
            self.scale = method.scale
            self.A, self.B = (site.parameter(*size) for size in method.sizes(*site.shape))
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

        def sides(self) -> tuple[Factor, Factor]:
            """A and B."""
            return (self.A,), (self.B,)


class Beside(Adapter):
    """A ⊗ B, and perhaps a multiple of the input, beside a feed-forward sublayer."""

    not_linear: ClassVar[str] = "it stands beside the whole feed-forward sublayer, which is not linear"
    tokenwise: ClassVar[bool | None] = True

    def __init__(self, method: KronA, site: Site, width: int, state: State, key: str | None):
        super().__init__(site)
        self.scale, self.state, self.key = method.scale, state, key
        self.A, self.B = (site.parameter(*size) for size in method.sizes(width, width))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.t = site.parameter(1) if method.place == "block_residual" else None

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Add the share of what the sublayer reads."""
        y = run(*args, **kwargs)
        if self.key is not None:
            x = self.state.taps.pop(self.key)
        else:
            x = args[0] if args else next(iter(kwargs.values()))
        share = self.scale * kronecker_linear(x, (self.A.to(x.dtype),), (self.B.to(x.dtype),))
        if self.t is not None:
            share = share + self.t.to(x.dtype) * x
        return plus(y, share.to(first(y).dtype))


def _outward(
    method: KronA, layers: Mapping[str, Adapter]
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """Options under which PEFT's rule gives our sizes, and the factors; None where there are none."""
    sites = [layer.site for layer in layers.values()]
    if method.place != "weight" or any(site.kind != "linear" or site.transposed for site in sites):
        return None
    shapes = {site.shape: method.sizes(*site.shape) for site in sites}
    for factor in (-1, *(method.a or ())):
        if all((split(out, factor)[0], split(in_, factor)[0]) == a for (out, in_), (a, _) in shapes.items()):
            r = -(-max(side for _, b in shapes.values() for side in b) // 2)  # from here on both factors are whole
            options = {"r": r, "alpha": method.scale * r, "decompose_factor": factor}
            return options, {path: layer.state_dict() for path, layer in layers.items()}
    return None
