"""LoRA that is unloaded into the weight after each stage, wholly or in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field
from torch import nn

from adapterlab.methods.schedule._restarts import Restarts
from adapterlab.optim import written
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class PeriodicLoRA(Restarts):
    """Unload LoRA into the weight after each stage and start it anew, with a momentum that damps short stages.

    y = (W + s Σ B_i A_i) x + b + s · B A x, the sum over what was unloaded, s as in LoRA. At the end of each of `links`
    equal stages the share 1 − μ (`momentum`) of s · B A is unloaded and B ← μ B, so that the output does not change; A
    stays. With μ = 0 all of it is unloaded, A is drawn anew and B = 0. With each stage optimizer and learning rate
    schedule begin anew, unless `reset_optimizer` or `reset_scheduler` is off.

    There is no code of the authors, and the paper's formula of the momentum could not be read. This one was chosen
    because it keeps the function: scaling both factors, as an implementation of others does, would change it by
    μ (1 − μ) s · B A at each event. The schedule is the trainer's, compressed into each stage; the last one stays live.

    Where it attaches: as LoRA.

    Start: B = 0 (for embeddings A = 0), so the first output equals the base's.

    Trainable parameters: r (in + out) for each module.

    Inference: can be merged, at no cost; the original weights come back to the bit. `adapterlab export --as lora`
    writes the whole as one LoRA of rank links · r, exactly. What was unloaded is kept in float32, see `in_base`.

    The learning rate is that of LoRA.

    Rate: 5e-4, LoRA's, as the authors' runs could not be read.

    Reference: "PeriodicLoRA: Breaking the Low-Rank Bottleneck in LoRA Optimization", arXiv 2402.16141.

    Example:
        >>> from adapterlab.methods.schedule.periodic_lora import PeriodicLoRA
        >>> PeriodicLoRA(links=4, momentum=0.5).kept
        0.5
    """

    links: int = Field(4, ge=1, description="number of stages, each with an update of rank r")
    momentum: float = Field(0.0, ge=0, lt=1, description="share μ of the update that stays in the factors")
    reset_optimizer: bool = Field(True, description="begin each stage with an optimizer that knows nothing")
    reset_scheduler: bool = Field(True, description="begin each stage with the schedule from its start")

    @property
    def kept(self) -> float:
        """The momentum."""
        return self.momentum

    def rate(self, step: int, steps: int, plain: Callable[[float], float]) -> float:
        """The whole schedule for each stage, or one for all."""
        _, place, length = self.place_in(step, steps)
        return plain(place * steps / length) if self.reset_scheduler else plain(step)

    def forget(self, optimizer: Optimizer, p: nn.Parameter) -> None:
        """Forget everything, or nothing."""
        if self.reset_optimizer:
            super().forget(optimizer, p)
        written(optimizer, p)
