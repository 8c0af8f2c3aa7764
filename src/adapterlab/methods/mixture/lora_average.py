"""The average of saved LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from adapterlab.methods.mixture._library import (
    MixedLibrary,
    Place,
    Update,
    check_ranks,
    check_targets,
    mixed,
    thin_svd,
)
from adapterlab.registry import register


@register
class LoRAAverage(MixedLibrary):
    """Average saved low-rank adapters: no data, no router, and what every routed mixture has to be better than.

    `deltas`: ΔW = Σ_i w_i s_i B_i A_i, w_i = 1/N, kept exactly as the factors side by side, A `[Σ r_i, in]` and
    B `[out, Σ r_i]` with w_i s_i in it; ranks, scales and targets may differ, and a module that an adapter leaves alone
    counts as a change of 0. With `rank` its best approximation of that rank, by a decomposition of the factors.
    `factors`: ΔW = (Σ w_i s_i B_i) (Σ w_i A_i) of one rank, which has products of one adapter's B with another's A;
    of N independent adapters it keeps 1/√N of the size.

    Where it attaches: at the linear layers that any of the `adapters` adapts. These are folders of trained adapters or
    of their runs, or names of adapters on the model. Any method whose update is low-rank will do; heads that they
    trained are left behind.

    Start: the average; nothing trains, and the folders are needed no more.

    Trainable parameters: 0.

    Inference: W + ΔW can be merged, at no cost. Saved it is a plain LoRA of HF PEFT.

    Rate: 5e-4, that of LoRA; here nothing trains.

    Reference: "Towards Modular LLMs by Building and Reusing a Library of LoRAs", arXiv 2405.11157, which compares with
    both forms; `deltas` is HF PEFT's combination "cat" (with `rank` its "svd"), `factors` is what "linear" of
    AdapterHub's library does.

    Example:
        >>> from adapterlab.methods.mixture.lora_average import LoRAAverage
        >>> LoRAAverage(adapters={"math": "runs/math", "code": "runs/code"}).shares
        {'math': 0.5, 'code': 0.5}
    """

    formula: ClassVar[str] = "0"

    weights: dict[str, float] | None = Field(None, description="w_i by the name of the part; default: equal shares")
    mix: Literal["deltas", "factors"] = Field(
        "deltas", description="what is averaged: the changes of the weights, or A and B each by itself"
    )
    rank: int | None = Field(None, ge=1, description="largest rank of a module's average; default: exact")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weights is not None and self.weights.keys() != self.adapters.keys():
            raise ValueError(
                f"weights={self.weights} should name the same parts as adapters: {', '.join(self.adapters)}"
            )
        if self.rank is not None and self.mix == "factors":
            raise ValueError(f"rank={self.rank} goes with mix='deltas': averaged factors keep the rank that they have")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """The weights w_i."""
        return self.weights or dict.fromkeys(self.adapters, 1 / len(self.adapters))

    def check(self, places: Mapping[str, Place]) -> None:
        """Averaged factors have to be of one form."""
        if self.mix == "factors":
            check_targets(self.id, self.adapters, places, ", or take mix=deltas, for which they may differ")
            check_ranks(self.id, places, ", or take mix=deltas, for which they may differ")

    def mixture(self, updates: Mapping[str, Update]) -> tuple[Tensor, Tensor]:
        """The average of one module."""
        a, b = mixed(updates, self.shares, self.mix)
        return (a, b) if self.rank is None or self.rank >= len(a) else truncated(a, b, self.rank)


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B A of a rank: √S Vᵀ and U √S of its largest singular values."""
    u, s, vh = thin_svd(a, b)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
