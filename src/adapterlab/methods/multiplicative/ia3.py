"""Infused adapter: learned scales on keys, values and inner activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.core.targets import Targets, matcher
from adapterlab.registry import register

PAPER = ("k", "v", "qkv", "down")


@register
class IA3(LayerMethod):
    """Rescale keys, values and the inner activations of the feed-forward network by learned vectors.

    k' = l ⊙ (W_k x + b), v' = l ⊙ (W_v x + b), and W_down (l ⊙ h) + b for modules listed in `feedforward`.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too). The default takes, of the roles k, v,
    qkv and down, those that the model has; a fused qkv is scaled as a whole.

    Start: l = 1, so the first output equals the base's.

    Trainable parameters: out for each module, or in for feed-forward modules.

    Inference: diag(l) W, or W diag(l), can be merged, at no cost.

    Rate: 5e-3, the best run in HF PEFT's comparison; the authors take 3e-3 with Adafactor. LoRA's 1e-4 trains too
    little. The scales are not decayed, which would pull them to zero instead of one.

    Reference: "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
    arXiv 2205.05638.

    Example:
        >>> from adapterlab.methods.multiplicative.ia3 import IA3
        >>> IA3(targets=["v", "down"]).feedforward
        ('down',)
    """

    formula: ClassVar[str] = "out (in for feed-forward modules)"

    targets: Targets = Field(
        default_factory=lambda: Targets(include=PAPER),
        description="which modules to adapt; the default takes those of its roles that the model has",
    )
    feedforward: tuple[str, ...] = Field(
        ("down",), description="adapted modules (entries as in targets) whose input is scaled instead of the output"
    )

    hf: ClassVar[HFCodec | None] = HFCodec(
        "IA3",
        fields={"feedforward": "feedforward_modules"},
        tensors={"l": "ia3_l"},
        accepts={"init_ia3_weights": (True, False)},
        subsets={"feedforward_modules": "on_input"},
    )

    @field_validator("feedforward", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def tensor_options(self) -> Mapping[str, Mapping[str, Any]]:
        """The scales start at one and are not decayed."""
        return {"l": {"weight_decay": 0.0}}

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the targets; of the default ones, those that exist."""
        targets = self.targets
        if targets.include == PAPER:
            roles = {site.role for site in host.all_sites() if site.kind in self.kinds}
            targets = targets.replace(include=tuple(role for role in PAPER if role in roles) or PAPER)
        for site in host.sites(targets, self.kinds):
            host.wrap(name, site, self.build(site, host, name))

    class Layer(Adapter):
        """The scales of one module."""

        def __init__(self, method: IA3, site: Site):
            super().__init__(site)
            out, in_ = site.shape
            self.on_input = any(matcher(entry)(site) for entry in method.feedforward)
            self.l = site.parameter(1, in_) if self.on_input else site.parameter(out, 1)
            nn.init.ones_(self.l)

        def around(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Scale the input or the output."""
            return run(self.scaled(x), *args, **kwargs) if self.on_input else self.scaled(run(x, *args, **kwargs))

        def scaled(self, x: Tensor) -> Tensor:
            """L ⊙ x, from l − 1: a small change survives in a half-precision dtype."""
            return torch.addcmul(x, x, (self.l.flatten() - 1).to(x.dtype))
