"""A chain of low-rank updates, each learned from the beginning on top of those before it."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from adapterlab.methods.schedule._restarts import Restarts
from adapterlab.registry import register


@register
class ChainOfLoRA(Restarts):
    """Learn what one low-rank update leaves over by another one: several LoRAs one after another, each from the start.

    y = (W + s Σ B_i A_i) x + b + s · B A x, the sum over the links that ended, s as in LoRA. The run is divided into
    `links` equal parts. When a part ends, its link is fixed ("tie the knot"), and a new one begins with A drawn anew,
    B = 0, a new optimizer and the whole learning rate schedule again, compressed into its part.

    There is no code of the authors. What follows the paper: the three steps (tune, tie, extend), a fresh optimizer and
    schedule, compute shared out so that the whole costs what one LoRA does. What was chosen here: equal parts, one rank
    for all links, and that the last link stays live instead of being tied.

    Where it attaches: as LoRA.

    Start: B = 0 (for embeddings A = 0), so the first output equals the base's.

    Trainable parameters: r (in + out) for each module.

    Inference: can be merged, at no cost; the original weights come back to the bit. `adapterlab export --as lora`
    writes the whole as one LoRA of rank links · r, exactly. Finished links are float32 beside the model, see `in_base`.

    The learning rate is that of LoRA.

    Rate: 5e-4, LoRA's, as the authors' runs could not be read.

    Reference: "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning", arXiv 2401.04151.

    Example:
        >>> from adapterlab.methods.schedule.chain_of_lora import ChainOfLoRA
        >>> ChainOfLoRA(links=3).starts(300)
        [0, 100, 200]
    """

    links: int = Field(3, ge=1, description="number of updates of rank r that are trained one after another; 1 to 3")

    def rate(self, step: int, steps: int, plain: Callable[[float], float]) -> float:
        """The whole schedule for each link."""
        _, place, length = self.place_in(step, steps)
        return plain(place * steps / length)
