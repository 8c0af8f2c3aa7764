"""Full fine-tuning, the reference that other methods are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import MakeOptimizer, Method
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class Full(Method):
    """Train every base parameter in place.

    θ = θ₀ + δ with a dense δ. Tied weights are one parameter and stay tied.

    Where it attaches: all parameters, minus those of modules that `exclude` names.

    Trainable parameters: all of them.

    With `layer_decay` γ < 1 the rate of layer l of L is lr · γ^(L − 1 − l), what comes before the layers has lr · γ^L,
    and what comes after them lr; an embedding that is tied to the head counts as the head.
    With `anchor` λ the penalty λ · mean((θ − θ₀)²) pulls towards the base (L2-SP). When the base is in half
    precision, the optimizer keeps float32 masters: plain bf16 updates lose most small steps.

    Cost of a step: the gradient of W is a third product as large as W x and Wᵀ g, which are all that LoRA needs: 6 t
    out in operations instead of 4 for t tokens. AdamW then reads and writes about 28 bytes for each number.

    Rate: 5e-5, where `transformers.Trainer` begins; models of billions of parameters take 1e-5 to 2e-5.

    Reference: none; "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", arXiv 1802.01483,
    for the anchor.
    """

    paper: ClassVar[str] = "Full fine-tuning"
    formula: ClassVar[str] = "all parameters"

    exclude: tuple[str, ...] = Field((), description="modules to leave frozen: roles, names or patterns")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor of the learning rate from one layer to the one below"
    )
    anchor: float = Field(0.0, ge=0, description="strength of the pull towards the base values")
    keep_base: bool = Field(
        True, description="store the original values, so that the adapter can be switched off and removed"
    )

    def attach(self, host: Carrier, name: str) -> None:
        """Own every parameter that is not excluded."""
        for path in host.base_parameters(self.exclude):
            host.own(name, path, keep=self.keep_base or self.anchor > 0)

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """One group of parameters for each layer when the rate decays with depth."""
        if self.layer_decay == 1.0:
            return make(host.parameters(name))
        named = {path.removeprefix("base."): p for path, p in host.named_parameters(name).items()}
        places = {path: host.layer_of(path) for path in named}
        last: dict[str | None, int] = {}
        for stack, layer in places.values():
            last[stack] = max(last.get(stack, 0), layer or 0)
        above = {id(p) for site in host.all_sites() if site.is_head for p in site.module._parameters.values()}
        groups: dict[float, list[Tensor]] = {}
        started = False
        for path, p in named.items():
            stack, layer = places[path]
            started = started or layer is not None
            below = max(last.values(), default=0) + 1
            depth = last[stack] - layer if layer is not None else 0 if started or id(p) in above else below
            groups.setdefault(self.layer_decay**depth, []).append(p)
        return make([{"params": members, "lr_factor": factor} for factor, members in groups.items()])

    def unsplit(self, host: Carrier, name: str) -> str:
        """Only the pull towards the base needs it whole."""
        return "its anchor reads all weights outside of the forward pass" if self.anchor else ""

    def penalty(self, host: Carrier, name: str) -> Tensor | None:
        """λ · mean((θ − θ₀)²) over all trained entries."""
        if not self.anchor:
            return None
        pairs = [(host.model.get_parameter(p.path), p.original) for p in host.patches[name].values()]
        squares = [(p - start).float().square().sum() for p, start in pairs if start is not None]
        total: Tensor = torch.stack(squares).sum()
        return self.anchor / sum(p.numel() for p, _ in pairs) * total
