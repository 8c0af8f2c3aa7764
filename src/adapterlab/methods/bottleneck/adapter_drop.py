"""Adapters that work without those of the first layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from adapterlab import registry
from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Composite, Method
from adapterlab.errors import AdapterlabError, AttachError, ConfigError
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer

_WHOLE = ("optimizer", "gradient", "rate")  # hooks that parts of a composite do not have


@register
class AdapterDrop(Composite):
    """Leave the adapters of the first n layers out, so that these layers are the base's and need no backward pass.

    Layer ℓ (counted from 0, in each stack of layers by itself) has its adapter where ℓ ≥ n. Robust training draws n
    from 0 .. L − 1, each with the same probability, for every step; specialised training (`robust=False`) has no
    adapters below `drop` at all. Outside of training n is `drop`; `method.choose(host, name, n)` takes another one.

    Where it attaches: where the method `adapter` does, which may be any that puts adapters into layers and leaves the
    base's weights alone; its norms are dropped with its adapters.

    Start: that of `adapter`.

    Trainable parameters: those of `adapter`; with `robust=False` of its layers from n on.

    A step trains what it computes: dropped adapters get no gradient at all, so that neither momentum nor weight decay
    moves them. n is a function of the seed and the step.

    Inference: as `adapter`, and n layers fewer have one. With `al.Parallel` several tasks share the first n layers,
    which are computed once (in language models with use_cache=False).

    Cost of a step: the backward pass ends at layer n. Measured on a CPU with 12 layers of width 256, 4 × 128 tokens,
    adapters of width 16, medians of nine paired ratios: of the time with n = 0, a step with n = 5 takes 0.77 (0.70 to
    0.88) and one with n = 11 takes 0.45; a forward pass takes 0.97 with either.

    Rate: 1e-4, that of the usual `adapter`, adapter_pfeiffer.

    Reference: "AdapterDrop: On the Efficiency of Adapters in Transformers", arXiv 2010.11918.

    Example:
        >>> from adapterlab.methods.bottleneck.adapter_drop import AdapterDrop
        >>> {AdapterDrop().draw(6, step) for step in range(100)} == {0, 1, 2, 3, 4, 5}
        True
    """

    formula: ClassVar[str] = "those of the adapter"
    starts_at_base: ClassVar[bool] = False

    adapter: str = Field("adapter_pfeiffer", description="method whose adapters are dropped")
    settings: dict[str, Any] = Field(
        default_factory=dict, examples=[{"reduction": 16}], description="settings of that method"
    )
    drop: int = Field(0, ge=0, description="number n of layers without adapter outside of training")
    robust: bool = Field(True, description="draw n in each step of training; otherwise n is `drop` there too")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the draws")

    @field_validator("adapter")
    @classmethod
    def _has_parts(cls, value: str) -> str:
        try:
            method = registry.method(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        own = [hook for hook in _WHOLE if method.overrides(hook)]
        if own or not method.trains or issubclass(method, cls):
            reason = f"it has its own {own[0]!r}, which a part cannot have" if own else "it has no adapters of its own"
            raise ValueError(f"layers of {value} cannot be dropped: {reason}; choose for example adapter_houlsby")
        return value

    @model_validator(mode="after")
    def _fitting(self) -> AdapterDrop:
        try:
            registry.method(self.adapter)(**self.settings)
        except AdapterlabError as error:
            raise ValueError(f"settings={self.settings} of {self.adapter}: {error}") from None
        return self

    def parts(self, host: Carrier) -> dict[str, Method]:
        """The method whose adapters are dropped."""
        return {"adapter": registry.method(self.adapter)(**self.settings)}

    def attach(self, host: Carrier, name: str) -> None:
        """Attach the adapters, without those of the first layers."""
        super().attach(host, name)
        self._begin(host, name)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Likewise."""
        super().attach_saved(host, name, tensors)
        self._begin(host, name)

    def _begin(self, host: Carrier, name: str) -> None:
        """Leave the first layers out; without robust training their adapters are taken off.

        Raises:
            AttachError: the method changes the base's weights or has no adapters in layers, or there are too few.
        """
        self._check(host, name)
        if self.robust:
            self.choose(host, name, self.drop)
            return
        for key in host.part_methods(name):
            for adapter in list(host.adapters(key).values()):
                if below(adapter, self.drop):
                    host.unwrap(key, adapter.site)

    def draw(self, depth: int, step: int) -> int:
        """Return how many of so many layers have no adapter in a step (counted from 0)."""
        return int(np.random.default_rng([self.seed, step]).integers(depth))

    def depth(self, host: Carrier, name: str) -> int:
        """Return the number of layers, of the shortest stack where there are several."""
        last: dict[str | None, int] = {}
        for adapter in self.adapters(host, name):
            if adapter.site.layer is not None:
                last[adapter.site.stack] = max(last.get(adapter.site.stack, 0), adapter.site.layer)
        return min(last.values(), default=-1) + 1

    def adapters(self, host: Carrier, name: str) -> list[Adapter]:
        """Return what may be dropped, and what lies outside of the layers and stays."""
        return [adapter for key in host.part_methods(name) for adapter in host.adapters(key).values()]

    def choose(self, host: Carrier, name: str, n: int) -> None:
        """Leave out the adapters of the first n layers.

        Raises:
            ConfigError: there are not more than n layers.
        """
        depth = self.depth(host, name)
        if not 0 <= n < depth:
            raise ConfigError(f"{self.id}: n = {n} of {depth} layers cannot be dropped. Choose 0 to {depth - 1}.")
        for adapter in self.adapters(host, name):
            adapter.idle = below(adapter, n)

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Draw n, and let what is left out wait without a gradient: one of zeros would let momentum act."""
        super().before_step(host, name, step, optimizer)
        if self.robust:
            self.choose(host, name, self.draw(self.depth(host, name), step))
        for adapter in self.adapters(host, name):
            train(adapter, not adapter.idle)

    def after_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Go back to the n of everything but training."""
        super().after_step(host, name, step, optimizer)
        if self.robust:
            self.choose(host, name, self.drop)
        for adapter in self.adapters(host, name):
            train(adapter, True)

    def _check(self, host: Carrier, name: str) -> None:
        depth = self.depth(host, name)
        owned = [path for key in host.part_methods(name) for path in host.patches[key]]
        if owned:
            raise AttachError(
                f"{self.id}: {self.adapter} changes {owned[0]} in the base itself, which cannot be left out for a "
                "step. Choose a method that adds tensors beside the weights."
            )
        if self.drop >= depth:
            raise AttachError(
                f"{self.id}: drop = {self.drop}, and {depth} layers of {type(host.model).__name__} have adapters of "
                f"{self.adapter}. " + (f"Choose 0 to {depth - 1}." if depth else "Choose targets inside the layers.")
            )


def below(adapter: Adapter, n: int) -> bool:
    """Say whether an adapter is in one of the first n layers."""
    return adapter.site.layer is not None and adapter.site.layer < n


def train(adapter: Adapter, on: bool) -> None:
    """Let the tensors of an adapter train, or wait."""
    for p in adapter.parameters():
        p.requires_grad_(on)
        if not on:
            p.grad = None
