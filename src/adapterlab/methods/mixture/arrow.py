"""Routing of tokens to saved LoRAs by what their updates amplify."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from adapterlab.core.carrier import Carrier
from adapterlab.core.kept import Kept
from adapterlab.core.site import Site
from adapterlab.core.state import State
from adapterlab.methods.mixture._experts import Routed, refuse_tied
from adapterlab.methods.mixture._library import (
    Library,
    Place,
    Update,
    check_ranks,
    check_targets,
    library,
    thin_svd,
)
from adapterlab.ops.experts import scores
from adapterlab.registry import register


@register
class Arrow(Library):
    """Let each token choose among saved low-rank adapters those whose updates amplify it most; nothing is trained.

    p_e `[in]`, the first right singular vector of s_e B_e A_e, is the direction that expert e amplifies most. With
    z_e = |p_e · x| / `temperature` for the raw input x of a module, a token takes the `top_k` experts of largest z, and
    c is the softmax over these: y = W x + b + Σ_e c_e s_e B_e A_e x, or with `mix="factors"` the authors' form
    y = W x + b + (Σ_e c_e s_e B_e) (Σ_e c_e A_e) x. The sign of a singular vector means nothing, hence |·|. z grows
    with the size of x, so that in layers of large activations the temperature sharpens less.

    `general` are adapters of general knowledge: the mean of their A and the mean of their B are subtracted from the A
    and the B of every expert first, so that these differ in what they alone know.

    Where it attaches: at the linear layers of the `adapters`, which must be the same for all and whose weights are not
    tied. These are folders of trained adapters or of their runs, or names of adapters on the model. Any method whose
    update is low-rank will do; their dropout and heads that they trained are left behind. Ranks may differ, but for
    `mix="factors"` and `general`.

    Start: the mixture; nothing trains, and the folders are needed no more.

    Trainable parameters: 0.

    Inference: not mergeable. Beside the product of the module E r (in + out) + E in products for a token. It sees one
    token at a time, so caches, padding and mixed batches change nothing.

    p_e is computed exactly, from a matrix of the size of the rank, and anew when an expert's tensors change. HF PEFT
    takes 15 power iterations, which agree where the first two singular values lie apart; its `create_arrow_model` makes
    the same of the same folders.

    Rate: 5e-4, that of LoRA; here nothing trains.

    Reference: "Towards Modular LLMs by Building and Reusing a Library of LoRAs", arXiv 2405.11157; `general`:
    "GenKnowSub: Improving Modularity and Reusability of LLMs through General Knowledge Subtraction", arXiv 2505.10939.

    Example:
        >>> from adapterlab.methods.mixture.arrow import Arrow
        >>> Arrow(adapters={"math": "runs/math", "code": "runs/code"}).mix
        'outputs'
    """

    formula: ClassVar[str] = "0"

    general: dict[str, str] = Field(
        default_factory=dict, description="adapters of general knowledge, whose mean is subtracted from the experts"
    )
    top_k: int | None = Field(
        None, ge=1, description="experts used for a token; default: three, or all where there are fewer"
    )
    temperature: float = Field(1.0, gt=0, description="divides the scores: higher spreads the weights")
    mix: Literal["outputs", "factors"] = Field(
        "outputs", description="what is averaged for a token: the outputs of its experts, or their A and B"
    )

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.top_k is not None and self.top_k > len(self.adapters):
            raise ValueError(
                f"top_k={self.top_k} is more than the {len(self.adapters)} adapters; lower it, or leave it out"
            )
        if both := self.general.keys() & self.adapters.keys():
            raise ValueError(f"general={self.general} and adapters both have {min(both)!r}: give each part a name")
        return self

    @property
    def selected(self) -> int:
        """Experts of a token."""
        return min(3, len(self.adapters)) if self.top_k is None else self.top_k

    def attach(self, host: Carrier, name: str) -> None:
        """Stack the experts at every module.

        Raises:
            FormatError: a folder holds no adapter, or one that does not fit the model.
            AttachError: an adapter has something else than low-rank updates, or the adapters do not fit each other.
        """
        every = {**self.adapters, **self.general}
        places = library(host, name, self.id, every)
        check_targets(self.id, every, places)
        if self.general or self.mix == "factors":
            check_ranks(self.id, places, "" if self.general else ", or take mix=outputs, for which they may differ")
        for place in places.values():
            refuse_tied(self.id, place.site)
            a, b = self.experts(place)
            layer = self.Layer(self, place.site, len(a), a.shape[1], host.state)
            with torch.no_grad():
                layer.A.copy_(a)
                layer.B.copy_(b)
            host.wrap(name, place.site, layer)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach the stacked experts, whose folders need not be there any more."""
        for site in host.all_sites():
            a = tensors.get(f"adapter.{site.path}.A")
            if a is not None and a.ndim == 3 and site.kind == "linear":
                host.wrap(name, site, self.Layer(self, site, len(a), a.shape[1], host.state))

    def experts(self, place: Place) -> tuple[Tensor, Tensor]:
        """Stack the experts of a module: A `[E, r, in]`, B `[E, out, r]` with the scales; low ranks end in zeros."""
        updates = [self.purified(place.updates[part], place.updates) for part in self.adapters]
        rank = max(len(u.A) for u in updates)
        a = torch.stack([F.pad(u.A, (0, 0, 0, rank - len(u.A))) for u in updates])
        return a, torch.stack([F.pad(u.scale * u.B, (0, rank - len(u.A))) for u in updates])

    def purified(self, update: Update, updates: Mapping[str, Update]) -> Update:
        """Subtract the mean A and the mean B of the general adapters."""
        if not self.general:
            return update
        a, b = (torch.stack([getattr(updates[part], key) for part in self.general]).mean(0) for key in "AB")
        return Update(update.A - a, update.B - b, update.scale)

    class Layer(Routed):
        """The experts at one module, and the directions that they amplify.

        Attributes:
            A: `[E, r, in]`.
            B: `[E, out, r]`; the scales are in it.
        """

        def __init__(self, method: Arrow, site: Site, experts: int, rank: int, state: State):
            super().__init__(site, state)
            self.A = site.parameter(experts, rank, site.shape[1])
            self.B = site.parameter(experts, site.shape[0], rank)
            self.requires_grad_(False)
            self.top_k = None if method.selected >= experts else method.selected
            self.renormalised = True
            self.temperature, self.mix = method.temperature, method.mix
            self.kept = Kept()

        def directions(self) -> Tensor:
            """P `[E, in]`: what each expert amplifies most; kept until A or B change."""
            if torch.compiler.is_compiling():
                return amplified(self.A, self.B)
            return self.kept.once("directions", lambda: amplified(self.A, self.B), self.A, self.B)

        def train(self, mode: bool = True) -> Self:
            """Switch between training and evaluation; forget the directions."""
            self.kept.clear()
            return super().train(mode)

        def weights(self, x: Tensor) -> Tensor:
            """What each expert counts for each token: `[..., in]` to `[..., E]`, in the experts' dtype."""
            with torch.autocast(x.device.type, enabled=False):
                return self.note(x, self.scores(x))

        def scores(self, x: Tensor) -> Tensor:
            """|P x| / temperature: `[..., E]`."""
            return scores(x, self.directions()).abs() / self.temperature

        def added(self, x: Tensor) -> Tensor:
            """Σ_e w_e B_e A_e x, or (Σ_e w_e B_e) (Σ_e w_e A_e) x, in two products with the weights between."""
            w = self.weights(x).to(x.dtype)[..., None]
            h = self.site.op(x, self.A.to(x.dtype).flatten(0, 1)).unflatten(-1, self.A.shape[:2])
            if self.mix == "factors":
                h = (w * h).sum(-2, keepdim=True)
            return self.site.mix((w * h).flatten(-2), self.B.to(x.dtype).transpose(0, 1).flatten(1))


@torch.no_grad()
def amplified(a: Tensor, b: Tensor) -> Tensor:
    """The first right singular vectors of B_e A_e: `[E, in]`, for A `[E, r, in]` and B `[E, out, r]`."""
    found: Tensor = thin_svd(a, b)[2][:, 0]
    return found
