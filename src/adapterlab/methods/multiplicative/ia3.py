"""Infused adapter: learned scales on keys, values and inner activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter, Tokenwise
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.hub import HubCodec, taken
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.core.targets import Targets, matcher
from adapterlab.errors import FormatError
from adapterlab.methods.low_rank import _hub_places
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
    usual: ClassVar[tuple[str, ...]] = PAPER

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

    hub: ClassVar[HubCodec | None] = HubCodec(
        options={**_hub_places.OPTIONS, "r": 1, "alpha": 1, "init_weights": "ia3", "composition_mode": "scale"},
        when={"architecture": "lora", "composition_mode": "scale"},
        fields={},
        ignores=("init_weights", "init_weights_seed", *_hub_places.PLACES),
        derived=lambda host, options, tensors: {
            "targets": _hub_places.as_targets(_hub_places.targets(host, tensors)), "feedforward": ()
        },
        outward=lambda host, key, method: _hub_outward(host, key, method),
        inward=lambda host, key, tensors: _hub_inward(host, key, tensors),
    )  # fmt: skip

    @field_validator("feedforward", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def tensor_options(self) -> Mapping[str, Mapping[str, Any]]:
        """The scales start at one and are not decayed."""
        return {"l": {"weight_decay": 0.0}}

    class Layer(Adapter):
        """The scales of one module."""

        shares_base: ClassVar[bool] = True

        def __init__(self, method: IA3, site: Site):
            super().__init__(site)
            out, in_ = site.shape
            self.on_input = any(matcher(entry)(site) for entry in method.feedforward)
            self.l = site.parameter(1, in_) if self.on_input else site.parameter(out, 1)
            nn.init.ones_(self.l)

        def around(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Scale the input or the output."""
            return run(self.scaled(x), *args, **kwargs) if self.on_input else self.scaled(run(x, *args, **kwargs))

        def serving(self) -> Tokenwise:
            """The scales as gain, or on the input."""
            return Tokenwise(on_input=self.l.flatten()) if self.on_input else Tokenwise(gain=self.l.flatten())

        def scaled(self, x: Tensor) -> Tensor:
            """L ⊙ x, from l − 1: a small change survives in a half-precision dtype."""
            return torch.addcmul(x, x, (self.l.flatten() - 1).to(x.dtype))


def _hub_outward(host: Carrier, key: str, method: IA3) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """AdapterHub scales outputs alone, the feed-forward network's before its nonlinearity; of a fused qkv two parts."""
    layers: Mapping[str, Any] = host.adapters(key)
    if any(layer.on_input for layer in layers.values()):
        raise FormatError(
            "AdapterHub's (IA)³ scales what modules return, in the feed-forward network before the nonlinearity, and "
            "this one scales what they read. Keep our own form, or HF PEFT's, or train with feedforward=[]."
        )
    tensors = {}
    for path, layer in layers.items():
        scales = layer.l.detach()
        if layer.site.role == "qkv":
            q, kv = scales.tensor_split([len(scales) // 3])
            if bool((q != 1).any()):
                raise FormatError("AdapterHub's (IA)³ leaves queries as they are, and this one scales them too.")
            scales = kv
        tensors[_hub_places.key(path, "lora_B")] = scales
    return _hub_places.options(host, {path: layer.site for path, layer in layers.items()}, fused="kv"), tensors


def _hub_inward(host: Carrier, key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `_hub_outward`: queries of a fused module have scales of one."""
    found = {}
    for path, layer in host.adapters(key).items():
        scales = taken(tensors, _hub_places.key(path, "lora_B"))
        missing = layer.site.shape[0] - len(scales)
        if layer.site.role == "qkv" and 2 * missing == len(scales):
            scales = torch.cat([scales.new_ones(missing, 1), scales])
        found[f"adapter.{path}.l"] = scales
    return found
