"""Full-rank training through low-rank updates that are merged and restarted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.site import Site
from adapterlab.errors import ConfigError
from adapterlab.methods.schedule._restarts import Restarts
from adapterlab.optim import Span, moments, steps_of, thin_out, written
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class ReLoRA(Restarts):
    """Train LoRA, merge it, restart it, and again, so that the sum of the low-rank updates has a high rank.

    y = (W + F + s Σ B_i A_i) x + b + s · B A x, the sum over the links that ended, s as in LoRA. After each of `links`
    parts of the run the link joins the sum, A is drawn anew and B = 0. Then

    - Adam forgets both moments of all entries of A and B but the share 1 − `reset_share` with the largest mean
      (`reset="magnitude"`) or a random one (`"random"`), all with their counter (`"all"`), or none;
    - the learning rate falls to nothing and rises for `restart_warmup` steps to where its schedule is then.

    `warm_start` trains the targets' weights in full first: F `[out, in]`, 0 at the start and constant afterwards.
    Without it the paper finds clearly worse pre-training. The sum and F are float32, and the base weight is W + F +
    sum, rounded once, so that a bfloat16 base loses nothing that was merged; see `in_base`.

    Where it attaches: as LoRA. In pre-training embeddings, norms and head train in full: `modules_to_save`.

    Start: B = 0 (for embeddings A = 0), so the first output equals the base's.

    Trainable parameters: r (in + out) for each module; in · out during the warm start.

    Inference: can be merged, at no cost; the original weights come back to the bit. Without a warm start
    `adapterlab export --as lora` writes the whole as one LoRA of rank links · r, exactly, or of a lower `--rank` with
    the energy that it keeps; with one, the nearest LoRA.

    The official runs have r = 128 and alpha = 32, links of 1,000 to 5,000 steps (after about a hundred it gets worse),
    reset_share 0.8 to 0.99, a warm start of a quarter, and a learning rate of 4e-4 to 1e-3, twice that of full
    training. They choose by itself what each of the two moments forgets, which divides some steps by squares that are
    forgotten, and merge one step after the rate was zero; no step has a rate of zero here. In fine-tuning and in models
    below 100 million parameters others found no gain.

    Cost of a step: that of LoRA; during the warm start two more products of the size of the weight's.

    Rate: 1e-3, as in the authors' instructions: about twice that of full training.

    Reference: "ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv 2307.05695.

    Example:
        >>> from adapterlab.methods.schedule.relora import ReLoRA
        >>> ReLoRA(links=4, warm_start=0.2).starts(1000)
        [200, 400, 600, 800]
    """

    links: int = Field(4, ge=1, description="number of updates of rank r that are trained one after another")
    warm_start: Span = Field(
        0, description="steps of full training before the first link: a number, or a share of the run (below 1)"
    )
    restart_warmup: Span = Field(
        0.02, description="steps in which the learning rate rises after a restart: a number, or a share of a link"
    )
    reset: Literal["magnitude", "random", "all", "none"] = Field(
        "magnitude", description="what the optimizer forgets at a restart: small moments, random ones, all, or none"
    )
    reset_share: float = Field(0.9, gt=0, lt=1, description="share of the moments that is forgotten")

    def first(self, steps: int) -> int:
        """Steps of the warm start."""
        return steps_of(self.warm_start, steps)

    def rate(self, step: int, steps: int, plain: Callable[[float], float]) -> float:
        """The trainer's schedule, with a ramp after each restart to where it is at the ramp's end."""
        link, place, length = self.place_in(step, steps)
        ramp = steps_of(self.restart_warmup, length)
        restarted = link > 0 or (link == 0 and self.first(steps) > 0)
        if restarted and place < ramp:
            return (place + 1) / ramp * plain(step - place + ramp)
        return plain(step)

    def begin(self, host: Carrier, name: str, steps: int) -> None:
        """Fit warm start, links and ramps into the run.

        Raises:
            ConfigError: it has fewer steps.
        """
        super().begin(host, name, steps)
        length = (steps - self.first(steps)) // self.links
        if steps_of(self.restart_warmup, length) >= length > 0 and self.links > 1:
            raise ConfigError(
                f"relora: restart_warmup={self.restart_warmup} is no shorter than the {length} steps that this run has "
                f"for each of its links. Choose less than {length}, a share such as 0.02, or fewer links."
            )

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Begin or end the warm start, or let the next link begin."""
        super().before_step(host, name, step, optimizer)
        layers = [layer for layer in self.layers(host, name).values() if isinstance(layer, ReLoRA.Layer)]
        steps = layers[0].steps if layers else None
        if steps is None or not self.warm_start:
            return
        warm = step < self.first(steps)
        if any(layer.warm != warm for layer in layers):
            for layer in layers:
                layer.switch(warm)
                if not warm and layer.full is not None:
                    optimizer.state.pop(layer.full, None)
            host.refresh(name)

    def forget(self, optimizer: Optimizer, p: nn.Parameter) -> None:
        """Forget most of the moments."""
        if self.reset == "all":
            super().forget(optimizer, p)
        elif self.reset != "none":
            thin_out(moments(optimizer, p), self.reset_share, self.reset)
        written(optimizer, p)

    class Layer(Restarts.Layer):
        """The links at one module, and what the warm start changed.

        Attributes:
            full: F `[out, in]`, or None without a warm start.
            warm: it trains now, and is computed beside the weight.
        """

        def __init__(self, method: ReLoRA, site: Site):
            super().__init__(method, site)
            self.full = site.parameter(*site.shape) if method.warm_start else None
            self.warm = False

        def switch(self, warm: bool) -> None:
            """Train F, or the link."""
            assert self.full is not None
            self.warm = warm
            for p, trains in ((self.full, warm), (self.A, not warm), (self.B, not warm)):
                p.requires_grad_(trains)
                if not trains:
                    p.grad = None

        def past(self) -> Tensor:
            """The links that ended, and F when it is done."""
            found = super().past()
            return found if self.full is None or self.warm else found + self.full.detach()

        def factors(self) -> tuple[Tensor, Tensor] | None:  # type: ignore[override]
            """What is not in the base weight, unless F is among it."""
            beside = self.full is not None and (self.warm or not self.in_base)
            return None if beside else super().factors()

        def delta(self) -> Tensor:
            """What is not in the base weight."""
            if self.full is None:
                return super().delta()
            link = self.full if self.warm else self.scale * (self.B @ self.A)
            return link if self.in_base else link + self.past()

        def change(self) -> tuple[Tensor, Tensor] | None:
            """All links; none with a warm start, which is no product of thin factors."""
            return super().change() if self.full is None else None
