"""LoRA that is trained for all ranks at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.site import Site
from adapterlab.errors import ConfigError
from adapterlab.methods.low_rank._starts import Initialiser
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class DyLoRA(LoRA):
    """Truncate the factors to a random rank b in each step, so that every prefix of ranks is a good adapter.

    y = W x + b + (alpha / b) · B[:, :b] A[:b] x with one b in r_min..r for the whole model and step, a function of the
    seed and the step alone. With `scale="sqrt"` the factor is alpha / √b.

    `update="prefix"` trains rows and columns 1..b, `update="row"` row and column b alone (the paper's cheaper variant).
    `strict` keeps the optimizer's momentum and decay from moving any others.

    Where it attaches: as LoRA.

    Start: B = 0 (for embeddings A = 0), so the first output equals the base's.

    Trainable parameters: r (in + out) for each module.

    Inference: outside of training the rank is `inference_rank`; `method.truncate(host, name, b)` chooses another one.
    It can be merged, at no cost.

    Rate: 4e-4, as in the authors' runs on RoBERTa.

    Reference: "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation",
    arXiv 2210.07558.

    Example:
        >>> from adapterlab.methods.low_rank.dylora import DyLoRA
        >>> {DyLoRA(r=4).draw(step) for step in range(50)} == {1, 2, 3, 4}
        True
    """

    hf: ClassVar[HFCodec | None] = None

    r_min: int = Field(1, ge=1, description="smallest rank that is drawn")
    inference_rank: int | None = Field(None, ge=1, description="rank outside of training; by default r")
    draws: Literal["uniform", "geometric"] = Field("uniform", description="how ranks are drawn; geometric has p = 0.15")
    update: Literal["prefix", "row"] = Field("prefix", description="train ranks 1 to b, or rank b alone")
    strict: bool = Field(False, description="let momentum and weight decay move only what a step trains")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the draws")

    @field_validator("init")
    @classmethod
    def _at_base(cls, value: Initialiser) -> Initialiser:
        if value.moves_base:
            raise ValueError(
                f"init={value.name!r} takes from the base what lower ranks then lack; choose kaiming, gaussian or eva"
            )
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for field in ("r_min", "inference_rank"):
            value = getattr(self, field)
            if value is not None and value > self.r:
                raise ValueError(f"{field}={value} is above r={self.r}; choose 1 to {self.r}")
        return self

    def draw(self, step: int) -> int:
        """Return the rank of a step (counted from 0)."""
        ranks = np.arange(self.r_min, self.r + 1)
        weights = 0.85 ** (ranks - self.r_min) if self.draws == "geometric" else np.ones(len(ranks))
        return int(np.random.default_rng([self.seed, step]).choice(ranks, p=weights / weights.sum()))

    def layers(self, host: Carrier, name: str) -> list[DyLoRA.Layer]:
        """Return the adapter's parts that have ranks."""
        return [a for a in host.adapters(name).values() if isinstance(a, DyLoRA.Layer)]

    def truncate(self, host: Carrier, name: str, b: int) -> None:
        """Choose the rank outside of training.

        Raises:
            ConfigError: it is not in 1..r.
        """
        if not 1 <= b <= self.r:
            raise ConfigError(f"dylora: the adapter {name!r} has ranks 1 to {self.r}, and b={b} was asked for.")
        for layer in self.layers(host, name):
            layer.rank = min(b, len(layer.A))

    def turns(self) -> int:
        """One rank after the other, if only one trains."""
        return self.r - self.r_min + 1 if self.update == "row" else 1

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Draw the rank of this step."""
        for layer in self.layers(host, name):
            layer.take(self.draw(step), alone=self.update == "row")

    @torch.no_grad()
    def after_backward(self, host: Carrier, name: str, step: int) -> None:
        """Note the values of what does not train in this step."""
        for layer in self.layers(host, name):
            layer.before = (layer.A.clone(), layer.B.clone()) if self.strict else None

    @torch.no_grad()
    def after_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Undo what momentum and weight decay did to the rest."""
        for layer in self.layers(host, name):
            if layer.before is not None:
                layer.A.copy_(torch.where(layer.trained[:, None] > 0, layer.A, layer.before[0]))
                layer.B.copy_(torch.where(layer.trained > 0, layer.B, layer.before[1]))
                layer.before = None

    class Layer(LoRA.Layer):
        """The factors and how much of them is used.

        Attributes:
            rank: used outside of training.
            drawn: weight of each rank in training `[r]`; a tensor, so that compiled code serves every rank.
            trained: 1 for the ranks that this step trains `[r]`.
            before: values before the optimizer's step, where `strict` asks for them.
        """

        drawn: Tensor
        trained: Tensor

        def __init__(self, method: DyLoRA, site: Site):
            super().__init__(method, site)
            self.root = method.scale == "sqrt"
            self.by_row = method.update == "row"
            self.rank = min(method.inference_rank or method.r, len(self.A))
            self.before: tuple[Tensor, Tensor] | None = None
            for name in ("drawn", "trained"):
                self.register_buffer(name, torch.ones(len(self.A), device=site.device), persistent=False)

        def weight_of(self, b: int) -> float:
            """What turns alpha / r into the scale of rank b."""
            ratio: float = len(self.A) / b
            return ratio**0.5 if self.root else ratio

        def take(self, b: int, alone: bool) -> None:
            """Use ranks 1..b in training, and train all of them or the last one alone."""
            b = min(b, len(self.A))
            ranks = torch.arange(1, len(self.A) + 1, device=self.drawn.device)
            self.drawn.copy_((ranks <= b) * self.weight_of(b))
            self.trained.copy_(ranks == b if alone else ranks <= b)

        def passing(self) -> tuple[Tensor, Tensor]:
            """A and B, which gradients reach where this step trains: what clips or averages sees no others."""
            if not self.by_row:  # ranks that are not used get none anyway
                return self.A, self.B
            trained, a, b = self.trained.to(self.dtype), self.A.detach(), self.B.detach()
            return a + trained[:, None] * (self.A - a), b + trained * (self.B - b)

        def factors(self) -> tuple[Tensor, Tensor]:
            """The first rows of A, with the scale of their number, and columns of B."""
            if self.training:
                a, b = self.passing()
                return a * self.drawn.to(self.dtype)[:, None], b
            return self.A[: self.rank] * self.weight_of(self.rank), self.B[:, : self.rank]
