"""A sparse mixture of low-rank updates with more experts in some layers than in others."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from adapterlab.core.carrier import Carrier
from adapterlab.core.site import Site
from adapterlab.core.targets import ALL_LINEAR
from adapterlab.errors import AttachError, nearest
from adapterlab.methods.mixture._experts import Experts, Mixture
from adapterlab.registry import register

SHAPES = {"inverted_triangle": "2468", "triangle": "8642", "hourglass": "8228", "rectangle": "5555"}


@register
class MoLA(Mixture):
    """Learn several low-rank updates for each weight, more in some layers, of which a router takes k for each token.

    y = W x + b + s · Σ_{e in top k} p̂_e(x) B_e A_e drop(x), s = alpha / r: p = softmax(R x), of which the k largest,
    divided by their sum, are p̂. A `[N, r, in]`, B `[N, out, r]`, R `[N, in]`. Of L layers, layer j (from 0) has
    N = experts[⌊j G / L⌋] experts, for G entries; each stack of layers is counted by itself. The authors found
    `2468`, more experts in higher layers, to be the best.

    Balance: each layer adds balance · N Σ_e f_e P_e to the loss, over all its adapted modules together: f_e is the
    share of all selections that expert e has, P_e the mean of p_e over tokens and modules. It is 1 where P is uniform
    and N / k where k experts take everything. Padding counts in neither.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too) inside a stack of layers.

    Start: B = 0, so the first output equals the base's; A and R as linear layers start, between ±1/√in.

    Trainable parameters: N (r (in + out) + in) for each module.

    Inference: not mergeable, since the choice depends on the token. It sees one token at a time, so caches, padding
    and mixed batches change nothing.

    The router runs in float32 whatever the dtype of x. All experts are computed, in two products, and those not chosen
    count 0.

    Cost of a step: the thin products are those of a LoRA of rank N r, 6 t N r (out + in) operations for t tokens,
    beside the large ones of 4 t out in; and the router's.

    Rate: 3e-4, as in the authors' runs.

    Reference: "Higher Layers Need More LoRA Experts", arXiv 2402.08562.

    Example:
        >>> from adapterlab.methods.mixture.mola import MoLA
        >>> method = MoLA(experts="2468")
        >>> [method.at(layer, 8) for layer in range(8)]
        [2, 2, 4, 4, 6, 6, 8, 8]
    """

    formula: ClassVar[str] = "N (r (in + out) + in) for each module, N experts in its layer"
    renormalised: ClassVar[bool] = True

    r: int = Field(8, ge=1, description="rank of each update")
    experts: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (2, 4, 6, 8),
        min_length=1,
        description="experts of the layers, from the lowest to the highest: a list, digits such as 2468, or a shape: "
        + ", ".join(f"{name} ({digits})" for name, digits in SHAPES.items()),
    )
    top_k: int = Field(2, ge=2, description="experts used for a token; with one its weight would always be 1")
    balance: float = Field(0.001, ge=0, description="factor of the loss that spreads tokens over the experts; 0: none")

    @field_validator("experts", mode="before")
    @classmethod
    def _pattern(cls, value: Any) -> Any:
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            return value
        digits = SHAPES.get(str(value), str(value))
        if not digits.isdigit():
            raise ValueError(f"{value!r} is neither digits, such as 2468, nor a shape. {nearest(str(value), SHAPES)}")
        return tuple(map(int, digits))

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.top_k > min(self.experts):
            raise ValueError(
                f"top_k={self.top_k} is more than the {min(self.experts)} experts of some layers ({self.experts}); "
                "lower it, or give every layer as many"
            )
        return self

    def at(self, layer: int, depth: int) -> int:
        """Experts in a layer of a stack of some depth."""
        return self.experts[layer * len(self.experts) // depth]

    def selected(self) -> int | None:
        """As the setting says."""
        return self.top_k

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the targets with the experts of their layers."""
        depths: dict[str | None, int] = defaultdict(int)
        for site in host.all_sites():
            depths[site.stack] = max(depths[site.stack], 1 + (site.layer or 0))
        balances: dict[Any, Balance] = defaultdict(lambda: Balance(self.balance))
        for site, layer in self._inside(host):
            experts: Any = self.made(site, host, self.at(layer, depths[site.stack]))
            if self.balance:
                experts.join(balances[site.stack, layer])
            host.wrap(name, site, experts)

    def _inside(self, host: Carrier) -> list[tuple[Site, int]]:
        """The targets and their layers; of all linear layers, those that lie in one.

        Raises:
            AttachError: another one does not.
        """
        sites = host.sites(self.targets, self.kinds)
        outside = [site.path for site in sites if site.layer is None]
        if outside and (self.targets.include != (ALL_LINEAR,) or len(outside) == len(sites)):
            raise AttachError(
                f"mola: {outside[0]} lies in no stack of layers, which says how many experts it gets. Leave it out of "
                "the targets."
            )
        return [(site, site.layer) for site in sites if site.layer is not None]

    class Layer(Experts):
        """The experts and the router at one module.

        Attributes:
            balance: of the layer that the module belongs to, or None.
        """

        balance: Balance | None = None

        def join(self, balance: Balance) -> None:
            """Be balanced together with the other modules of the layer."""
            balance.modules += 1
            self.balance = balance

        def routed(self, x: Tensor, z: Tensor, chosen: Tensor | None, w: Tensor) -> None:
            """Add the module's part of the balance to the losses."""
            super().routed(x, z, chosen, w)
            if self.balance is not None and self.state.listening:
                picked = torch.ones_like(z) if chosen is None else chosen.to(z.dtype)
                real = self.state.real_tokens(x)
                self.state.emit(self.balance.more(self.site.path, picked, z.softmax(-1), real))


class Balance:
    """What the routers of one layer add to the loss together, in parts that the modules emit as they are called.

    The loss is no sum over modules: each one emits by how much the loss of those called so far grows with it. A module
    that comes again begins a new pass. In a recomputation the parts are made as in the first pass.

    Attributes:
        factor: of the loss.
        modules: how many there are.
    """

    def __init__(self, factor: float, modules: int = 0):
        self.factor, self.modules = factor, modules
        self.begin()

    def begin(self) -> None:
        """Forget the modules called so far: their selections, sums of p, tokens, and the loss that they make."""
        self.seen: set[str] = set()
        self.picked: Any = 0
        self.sums: Any = 0
        self.tokens: Any = 0
        self.loss: Any = 0

    def __reduce__(self) -> Any:
        return Balance, (self.factor, self.modules)

    def more(self, path: str, picked: Tensor, p: Tensor, real: Tensor | None) -> Tensor:
        """By how much the loss grows with a module.

        Args:
            path: of the module.
            picked: `[..., N]`, 1 where a token has selected an expert.
            p: `[..., N]`.
            real: `[...]`, false at padding; None: there is none.
        """
        if path in self.seen:
            self.begin()
        self.seen.add(path)
        counted = p.new_ones(p.shape[:-1]) if real is None else real.to(p.dtype)
        self.picked = self.picked + counted.flatten() @ picked.reshape(-1, p.shape[-1])
        self.sums = self.sums + counted.flatten() @ p.reshape(-1, p.shape[-1])
        self.tokens = self.tokens + counted.sum()
        before, self.loss = self.loss, self.value()
        more = self.factor * (self.loss - before)
        if len(self.seen) == self.modules:
            self.begin()
        return more

    def value(self) -> Tensor:
        """N Σ_e f_e P_e of the modules called so far; 0 without tokens."""
        tokens = self.tokens.clamp(min=1)
        shares = self.picked / self.picked.sum().clamp(min=1)
        value: Tensor = len(shares) * (shares * self.sums).sum() / tokens
        return value
