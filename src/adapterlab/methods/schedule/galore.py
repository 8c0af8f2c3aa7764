"""GaLore: full training with Adam's moments in a low-rank projection of the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import MakeOptimizer, Method
from adapterlab.core.targets import Targets
from adapterlab.optim.chain import Chain
from adapterlab.optim.transforms import Adam, Project
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class GaLore(Method):
    """Train whole weight matrices, and run Adam on an r-dimensional projection of their gradients.

    For a gradient G `[m, n]` with m ≤ n: R = Pᵀ G, P the first r left singular vectors of G, chosen anew every
    `update_proj_gap` steps; W ← W − lr · (scale · P · adam(R) + wd · W). For m > n the right side is projected.

    Where it attaches: the weights of the linear layers that `targets` means are projected (GPT-2's `Conv1D` too);
    everything else (embeddings, norms, biases, head, 3-D experts) trains with plain Adam, unless `rest` is off.

    Start: the base's values.

    Trainable parameters: all of the base without `exclude`; with `rest` off, in · out for each target.

    Memory: 2 n r + m r floats of optimizer state for a matrix instead of 2 m n, in float32. With a half-precision base
    the optimizer also keeps float32 masters, because plain bf16 loses most small steps; `master_weights` off saves
    those 4 bytes an entry, as the paper does.

    Defaults are those of the authors' fine-tuning on GLUE. Pre-training takes r = 128 to 1024, scale = 0.25, 200 steps
    and a rate of 1e-2.

    Inference: nothing to merge. ΔW has rank r times the number of subspaces, so the result is a changed base.
    Moments are kept when the subspace changes. The layer-wise update of the official code is left out: it cannot
    accumulate or clip gradients. The rate of projected weights is lr · scale, that of weight decay lr.

    Cost of a step: the gradient of W is a third large product, 6 t out in operations instead of LoRA's 4 for t tokens;
    each gradient and each update is projected, 4 r out in.

    Rate: 3e-5, as in the authors' fine-tuning on GLUE: projected weights move at 1.2e-4, the others at 3e-5.

    Reference: "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507.

    Example:
        >>> from adapterlab.methods.schedule.galore import GaLore
        >>> GaLore(r=8).update_proj_gap
        500
    """

    formula: ClassVar[str] = "all parameters; with rest off: in · out"

    targets: Targets = Field(
        default_factory=lambda: Targets(include=("all-linear",)),
        description="modules whose weight gradients are projected: roles, module names, patterns or all-linear",
    )
    r: int = Field(4, ge=1, description="rank of the projection; 128 to 1024 in pre-training")
    update_proj_gap: int = Field(500, ge=1, description="steps between two choices of the subspace; 200 in pre-training")
    scale: float = Field(4.0, gt=0, description="factor of the projected updates; 0.25 in pre-training")
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = Field(
        "std", description="side that is projected: the shorter one, the longer one, always one, or both"
    )
    eps: float = Field(
        1e-6, gt=0, description="of the projected weights' Adam, added to √v before its bias correction, as the authors do"
    )
    rest: bool = Field(True, description="train everything else as well, with plain Adam")
    exclude: tuple[str, ...] = Field((), description="modules to leave frozen: roles, names or patterns")
    master_weights: bool = Field(True, description="keep float32 masters of half-precision weights")
    keep_base: bool = Field(
        True, description="store the original values, so that the adapter can be switched off and removed"
    )

    def attach(self, host: Carrier, name: str) -> None:
        """Own what trains."""
        projected = self.projected(host)
        for path, p in host.base_parameters((*self.exclude, *self.modules_to_save)).items():
            if self.rest or id(p) in projected:
                host.own(name, path, keep=self.keep_base)

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """Rebuild the usual AdamW with a projection around its Adam, for the target weights."""
        projected = self.projected(host)
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for p in host.parameters(name):
            groups[id(p) in projected].append(p)
        projection = Project(self.r, self.update_proj_gap, self.scale, self.proj_type)
        used = [is_projected for is_projected, members in groups.items() if members]
        plain = make([{"params": groups[is_projected]} for is_projected in used])
        around = [
            (projection, Adam(group["betas"], self.eps, early=True)) if is_projected else ()
            for is_projected, group in zip(used, plain.param_groups, strict=True)
        ]
        return Chain.like(plain, around, masters=self.master_weights)

    def projected(self, host: Carrier) -> set[int]:
        """Return the ids of the weights whose gradients are projected."""
        return {id(site.module._parameters["weight"]) for site in host.sites(self.targets, ("linear",))}
