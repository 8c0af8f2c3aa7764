"""LoRA with a higher learning rate for B."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import nn

from adapterlab.core.adapter import Copy
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import MakeOptimizer
from adapterlab.core.rows import Rows
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class LoRAPlus(LoRA):
    """Train B with a learning rate `ratio` times that of A, so that both factors learn at the right speed.

    y = W x + b + s · B A drop(x); lr of B = ratio · lr of A.

    Where it attaches: as LoRA.

    Start: B = 0, so the first output equals the base's.

    Trainable parameters: r (in + out) for each module.

    Inference: merges as LoRA does. Only the optimizer's groups differ:

    - factors of embeddings: `lr_embedding`;
    - B of all other modules, and one-dimensional tensors such as biases: ratio · lr, the latter without weight decay;
    - A and modules trained in full: lr.

    The learning rate is A's. A new classifier head learns at it too.

    Rate: 5e-5 for A, as in the authors' examples; on hard tasks about half of what suits LoRA.

    Reference: "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354.

    Example:
        >>> from adapterlab.methods.low_rank.lora_plus import LoRAPlus
        >>> LoRAPlus(r=4).ratio
        16.0
    """

    ratio: float = Field(16.0, ge=1, description="learning rate of B over that of A; about 16 is recommended")
    lr_embedding: float = Field(1e-6, gt=0, description="learning rate of the factors of embeddings")

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """Put the tensors into up to four groups."""
        kinds = {p: part.site.kind for p, part in host.adapters(name).items() if not isinstance(part, (Copy, Rows))}
        options: dict[str, dict[str, Any]] = {
            "embedding": {"lr": self.lr_embedding},
            "fast": {"lr_factor": self.ratio},
            "fast, no decay": {"lr_factor": self.ratio, "weight_decay": 0.0},
            "slow": {},
        }
        groups: dict[str, list[nn.Parameter]] = {group: [] for group in options}
        for key, p in host.named_parameters(name).items():
            path, _, leaf = key.removeprefix("adapter.").rpartition(".")
            if kinds.get(path) == "embedding":
                groups["embedding"].append(p)
            elif p.dim() == 1:
                groups["fast, no decay"].append(p)
            else:
                groups["fast" if leaf == "B" and path.partition(".factors.")[0] in kinds else "slow"].append(p)
        return make([{"params": members, **options[group]} for group, members in groups.items() if members])
