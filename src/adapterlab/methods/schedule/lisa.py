"""LISA: train embedding, head and, in turn, a few randomly drawn layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import MakeOptimizer, Method
from adapterlab.errors import AttachError, NotTrainingError
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class LISA(Method):
    """Train γ layers at full rank for some steps, then γ others; what lies outside the layers trains always.

    θ is trained in place. In steps t with ⌊t / interval⌋ = i the layers drawn from (seed, i) take gradients; the
    draw is a function of the step alone, so it is the same on all processes and after a resume.

    Where it attaches: all base parameters; at a time the embedding, the head, the final norm and γ of the L blocks of
    the backbone (of encoder and decoder together). Tied embeddings are one tensor, always on.

    Start: the base's values.

    Trainable parameters: at a time, everything outside the blocks plus γ blocks; over the run all of them.

    Memory: gradients and Adam's moments for what trains at the time. `on_switch` says what happens to the moments:
    `drop` forgets those of blocks that are frozen again, with their step count; what lies outside the blocks keeps its
    own. `restart` forgets all of them at each switch, embedding, head and norms included, as the paper's runs did,
    which were saved and loaded anew. `keep` lets memory grow to that of full fine-tuning, `offload` moves them to main
    memory and back. With a half-precision base a dropped float32 master leaves the rounded weight behind.

    Inference: nothing to merge; the result is a changed base.

    Rate: 5e-5, the largest of the authors' 1e-5 to 5e-5.

    Reference: "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
    arXiv 2403.17919.

    Example:
        >>> from adapterlab.methods.schedule.lisa import LISA
        >>> LISA(layers=2, interval=5).draw(8, step=4) == LISA(layers=2, interval=5).draw(8, step=0)
        True
    """

    formula: ClassVar[str] = "everything outside the blocks + γ blocks, at a time"

    layers: int = Field(2, ge=1, description="number γ of blocks that train at a time")
    interval: int = Field(20, ge=1, description="steps between two draws")
    on_switch: Literal["drop", "restart", "keep", "offload"] = Field(
        "drop", description="what happens to the optimizer state of blocks that are frozen again; restart: to all of it"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the draws")
    exclude: tuple[str, ...] = Field((), description="modules to leave frozen always: roles, names or patterns")
    keep_base: bool = Field(
        True, description="store the original values, so that the adapter can be switched off and removed"
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Draw one block at a time, anew in every step."""
        return {"layers": 1, "interval": 1}

    def attach(self, host: Carrier, name: str) -> None:
        """Own everything, and freeze all blocks but the first ones drawn."""
        count = len(host.layers)
        if self.layers > count:
            raise AttachError(f"lisa: layers={self.layers}, but the model has {count} blocks. Choose 1 to {count}.")
        for path in host.base_parameters((*self.exclude, *self.modules_to_save)):
            host.own(name, path, keep=self.keep_base)
        self._switch(host, name, 0)

    def draw(self, count: int, step: int) -> set[int]:
        """Return which of `count` blocks train in a step (counted from 0)."""
        generator = np.random.default_rng([self.seed, step // self.interval])
        return {int(i) for i in generator.choice(count, self.layers, replace=False)}

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """One over all blocks, those that wait too."""
        waiting = [p for p in self._owned(host, name) if not p.requires_grad]
        return make([*host.parameters(name), *waiting])

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Let the blocks of this step train, and settle the optimizer's state of the others."""
        self._switch(host, name, step)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for p in self._owned(host, name):
            if p.requires_grad and id(p) not in known:
                raise NotTrainingError(
                    f"lisa: the optimizer does not know all parameters of the layers drawn for step {step + 1}. Build "
                    f"it with host.methods[{name!r}].optimizer(host, {name!r}, make) and give it to the trainer."
                )
            if self.on_switch == "restart" and step % self.interval == 0:
                optimizer.state.pop(p, None)
            elif p.requires_grad:
                self._move(optimizer, p, to_parameter=True)
            elif self.on_switch in ("drop", "restart"):
                optimizer.state.pop(p, None)
            else:
                self._move(optimizer, p, to_parameter=False)

    def _switch(self, host: Carrier, name: str, step: int) -> None:
        blocks = host.layers
        drawn = self.draw(len(blocks), step)
        inside = {id(p) for block in blocks for p in block.parameters()}
        on = {id(p) for i in drawn for p in blocks[i].parameters()}
        for p in self._owned(host, name):
            p.requires_grad_(id(p) in on or id(p) not in inside)
            if not p.requires_grad:
                p.grad = None  # a gradient of zeros would still let momentum and weight decay act

    def _owned(self, host: Carrier, name: str) -> list[nn.Parameter]:
        return [host.model.get_parameter(path) for path in host.patches[name]]

    def _move(self, optimizer: Optimizer, p: nn.Parameter, *, to_parameter: bool) -> None:
        """Bring the state of a parameter to where it is used, or to main memory; counters stay where they are."""
        if self.on_switch == "offload" and p in optimizer.state:
            state, device = optimizer.state[p], p.device if to_parameter else "cpu"
            state.update({k: v.to(device) for k, v in state.items() if isinstance(v, Tensor) and v.dim()})
