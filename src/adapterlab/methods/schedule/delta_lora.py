"""LoRA whose steps are passed on to the weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.site import Site
from adapterlab.errors import ConfigError, NotTrainingError
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.optim import Span, steps_of
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class DeltaLoRA(LoRA):
    """Push the change that each step makes to B A into the weight as well, without a gradient or moments for it.

    y = W x + b + s · B A x, and after each step t > `start`: W ← W + push · s · (B A − B' A'), where B' A' is the
    product before the step. s as in LoRA.

    With a constant `push` the changes of W add up to push · s · (B A − B₀ A₀), A₀ and B₀ being the factors before the
    first of them. So W itself is left alone: A₀ and B₀ are kept, and the sum is added to the output, without gradient
    to A and B. It is exact, loses nothing in half precision, works on packed weights, and the end result
    s · ((1 + push) B A − push B₀ A₀) is a LoRA of rank 2r.

    Where it attaches: as LoRA. Dropout would break the identity of the two gradients and is not available.

    Start: B = 0 (for embeddings A = 0), so the first output equals the base's.

    Trainable parameters: r (in + out) for each module.

    Inference: can be merged, at no cost.

    The authors begin after 500 steps.

    Rate: 5e-4, LoRA's; the authors' code is not public.

    Reference: "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices", arXiv 2309.02411.

    Example:
        >>> from adapterlab.methods.schedule.delta_lora import DeltaLoRA
        >>> DeltaLoRA(r=4, start=100).push
        2.0
    """

    hf: ClassVar[HFCodec | None] = None

    dropout: float = Field(0.0, ge=0, le=0, description="not available: it would break the identity of the gradients")
    push: float = Field(2.0, gt=0, description="factor λ of the changes that the weight receives")
    start: Span = Field(
        0.1, description="steps K before the first such change: a number (integer), or a share of the run (below 1)"
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Begin at once."""
        return {"start": 1}

    def begin(self, host: Carrier, name: str, steps: int) -> None:
        """See that the weight follows at all.

        Raises:
            ConfigError: the run is over before it would.
        """
        layers = [layer for layer in host.adapters(name).values() if isinstance(layer, DeltaLoRA.Layer)]
        for layer in layers:
            layer.start = steps_of(self.start, steps)
        if steps_of(self.start, steps) >= steps and not any(bool(layer.pushed) for layer in layers):
            raise ConfigError(
                f"delta_lora: start={self.start} leaves none of this run's {steps} steps in which the weight follows "
                f"the factors, so it would be LoRA. Choose a start of 0 to {steps - 1}, a share of the run such as "
                "0.1, or train longer."
            )

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Keep the factors from before the first step that the weight follows.

        Raises:
            NotTrainingError: it is a share of a run of unknown length.
        """
        for layer in host.adapters(name).values():
            if not isinstance(layer, DeltaLoRA.Layer):
                continue
            if layer.start is None:
                raise NotTrainingError(
                    f"The delta_lora adapter {name!r} has start={self.start}, a share of the run, and does not know "
                    f"how many steps that has. Call host.methods[{name!r}].begin(host, {name!r}, steps) before the "
                    "first one; adapterlab's loop and AdapterlabCallback do it by themselves."
                )
            if step >= layer.start:
                layer.anchor(self.push)

    class Layer(LoRA.Layer):
        """The factors, those at the anchor, and `pushed`: 0 before the first change of the weight, then λ.

        Attributes:
            start: steps before that, once they are known.
        """

        A_kept: Tensor
        B_kept: Tensor
        pushed: Tensor

        def __init__(self, method: LoRA, site: Site):
            super().__init__(method, site)
            self.register_buffer("A_kept", torch.zeros_like(self.A))
            self.register_buffer("B_kept", torch.zeros_like(self.B))
            self.register_buffer("pushed", self.A.new_zeros(()).detach())
            start: Span = method.start  # type: ignore[attr-defined]
            self.start = start if isinstance(start, int) else None  # a share is a number once the run's length is known

        @torch.no_grad()
        def anchor(self, push: float) -> None:
            """Let the weight follow from the factors as they are now, unless it does already."""
            if not self.pushed:
                self.A_kept.copy_(self.A)
                self.B_kept.copy_(self.B)
                self.pushed.fill_(push)

        def factors(self) -> tuple[Tensor, Tensor]:
            """[A; A₀] and [(1 + λ) B, −λ B₀]; the gradients of A and B are those of s · B A alone."""
            # The product reaches A through (1 + λ) B, so its gradient is divided by that; through λ B none reaches B.
            still = self.A.detach()
            a = still + (self.A - still) / (1 + self.pushed)
            b = self.B + self.pushed * self.B.detach()
            return torch.cat([a, self.A_kept]), torch.cat([b, -self.pushed * self.B_kept], 1)
