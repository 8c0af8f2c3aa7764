"""LoRA with a frozen first factor."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import MakeOptimizer
from adapterlab.methods.low_rank._starts import Start
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.optim.chain import Chain
from adapterlab.optim.transforms import Back, State, Transform
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class LoRAFA(LoRA):
    """Freeze A at its random start and train B alone, so that the layer keeps r numbers a token instead of `in`.

    y = W x + b + s · B A x with A `[r, in]` constant, B `[out, r]` and s as in LoRA. ΔW stays in the row space of A.

    With `projected`, B follows ĝ = (1/s²) · g (A Aᵀ)⁺ in place of its own gradient g, before Adam: of all steps of B
    it is the one whose ΔW is closest to the full gradient's.

    Where it attaches: as LoRA. The saving counts where nothing else keeps the layer's input; gradient checkpointing
    keeps no activations anyway.

    Start: B = 0 (for embeddings too, where A is normal), so the first output equals the base's.

    Trainable parameters: r out for each module.

    Inference: W + s B A can be merged, at no cost. HF PEFT reads the saved adapter as a LoRA.

    Rate: 5e-4, LoRA's; HF PEFT's optimizer for it begins at 1e-3.

    Reference: "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv 2308.03303;
    the projected gradient is that of the optimizer HF PEFT has for it.

    Example:
        >>> from adapterlab.methods.low_rank.lora_fa import LoRAFA
        >>> LoRAFA(r=4, projected=True).scaling("model.layers.0.self_attn.q_proj")
        4.0
    """

    formula: ClassVar[str] = "r out"

    projected: bool = Field(False, description="step B so that its update is the closest to the full gradient's")

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """The usual one; with `projected` an AdamW that sees the projected gradients."""
        if not self.projected:
            return super().optimizer(host, name, make)
        layers = [a for a in host.adapters(name).values() if isinstance(a, LoRAFA.Layer)]
        seen = {id(layer.B) for layer in layers}
        rest = [p for p in host.parameters(name) if id(p) not in seen]
        groups = [{"params": [layer.B]} for layer in layers] + ([{"params": rest}] if rest else [])
        around: list[tuple[Transform, ...]] = [(Projected(layer),) for layer in layers]
        return Chain.like(make(groups), around + [()] * bool(rest))

    class Layer(LoRA.Layer):
        """The constant factor, a buffer, and the one that trains."""

        @torch.no_grad()
        def begin(self, start: Start) -> None:
            """Take over a start and freeze its A; an A that is zero could never be left again."""
            super().begin(start)
            a = self.A.detach()
            if not a.any():
                nn.init.normal_(a)
                nn.init.zeros_(self.B)
            del self.A
            self.register_buffer("A", a)


class Projected(Transform):
    """Turns the gradient of B into the one whose update s · B A is closest to the full gradient's."""

    by_entry: ClassVar[bool] = False

    def __init__(self, layer: LoRA.Layer):
        self.layer = layer

    def init(self, g: Tensor) -> State:
        """A never changes, so the inverse is computed once."""
        a = self.layer.A.detach().to(g.dtype).flatten(1)
        gram = a @ a.T + 1e-8 * torch.eye(len(a), dtype=a.dtype, device=a.device)
        return {"inverse": torch.linalg.pinv(gram, hermitian=True) / self.layer.scale**2}

    def update(self, g: Tensor, state: State, p: Tensor) -> tuple[Tensor, Back | None]:
        """`[out, r]` times `[r, r]`."""
        return g @ state["inverse"], None
