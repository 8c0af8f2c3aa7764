"""SAM, the second-order approximation method: train the entries whose change lowers the loss most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from rich.progress import track
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Batches, MakeOptimizer, Method
from adapterlab.errors import AttachError
from adapterlab.methods.in_place import _chosen_parameters as chosen
from adapterlab.registry import register
from adapterlab.terminal import Terminal

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class SAMSecondOrder(Method):
    """Choose once, before training, the entries whose best change lowers a quadratic model of the loss most.

    L(θ + M Δ) ≈ L + gᵀ M Δ + ½ (M Δ)ᵀ H (M Δ) with a diagonal H that is bounded by one number h: the best Δ of a mask
    lowers it by Σ over M of g_i² / (2 h). So the entries with the largest g_i² train, where g = Σ_b clip(g_b) is the
    signed sum of the gradients of whole batches, each clipped to the norm `clip` over all these entries; it is squared
    after the sum. (FishMask sums squares: that ranks by the noise of the gradient, this by its mean.)

    Where it attaches: all parameters, embeddings, norms and biases included, a tied one once; ⌊ρ n⌋ entries of each
    tensor of n, so one of fewer than 1 / ρ entries stays frozen. Nothing trains until `prepare` has seen data. A new
    head in `modules_to_save` trains whole, beside the budget.

    Start: the base's values; nothing is updated while gradients are summed, a head neither.

    Trainable parameters: the sum of ⌊ρ n⌋ over the tensors.

    Inference: nothing to merge, no cost.

    Memory: 20 bytes for each trained entry; the gradient of one tensor at a time. While gradients are summed 4 bytes
    for each entry of the base. The norm of a batch's gradient is measured in a backward pass of its own, so that no
    second copy of all gradients is needed: two backward passes a batch, or one with `clip` off.

    Gradients are summed without dropout, over the first `batches` batches; fewer, when one pass over the data has
    fewer, since another pass would only multiply the sum. This is not sharpness-aware minimisation.

    Rate: 1e-4, the authors', with batches of 16 and weight decay 0.01.

    Reference: "On the Effectiveness of Parameter-Efficient Fine-Tuning", arXiv 2211.15583.

    Example:
        >>> from adapterlab.methods.in_place.sam_second_order import SAMSecondOrder
        >>> SAMSecondOrder().batches
        600
    """

    formula: ClassVar[str] = "sum of ⌊ρ n⌋ over the tensors of n entries"

    density: float = Field(0.005, gt=0, le=1, description="share ρ of the entries of each tensor that train")
    batches: int = Field(600, ge=1, description="batches whose gradients are summed, at most")
    clip: float | None = Field(1.0, gt=0, description="norm that the gradient of a batch is clipped to; none: not")
    exclude: tuple[str, ...] = Field((), description="modules to leave frozen: roles, names or patterns")
    offload_scores: bool = Field(False, description="keep the sums in main memory while they are computed")

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Train one entry in twenty of each tensor."""
        return {"density": 0.05, "batches": 2}

    def attach(self, host: Carrier, name: str) -> None:
        """Check that there is something to choose."""
        self.budgets(self.eligible(host))

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Train the entries that were chosen when the adapter was saved."""
        self.attach(host, name)
        chosen.own_entries(host, name, chosen.saved_entries(tensors))

    def eligible(self, host: Carrier) -> dict[str, nn.Parameter]:
        """Return the parameters that entries are chosen from."""
        return chosen.eligible(host, self.id, (*self.exclude, *self.modules_to_save))

    def budgets(self, parameters: Mapping[str, nn.Parameter]) -> list[chosen.Budget]:
        """Return each parameter with the number of entries to choose in it.

        Raises:
            AttachError: there is none to choose in any.
        """
        left = chosen.share_of_each(parameters, self.density)
        if not left:
            most = max((p.numel() for p in parameters.values()), default=0)
            raise AttachError(
                f"{self.id}: density={self.density} leaves no entry to train in any of {len(parameters)} tensors, of "
                f"which the largest has {most:,}. Raise density{f' to {1 / most:.2g} or more' if most else ''}, or "
                "exclude less."
            )
        return left

    def prepare(self, host: Carrier, name: str, batches: Batches) -> None:
        """Sum the gradients and choose; an adapter that has its entries keeps them."""
        if chosen.is_chosen(host, name):
            return
        parameters = self.eligible(host)
        budgets = self.budgets(parameters)
        given = track(
            chosen.labelled(batches, self.batches), "scoring", self.batches, transient=True,
            console=Terminal(stderr=True),
        )  # fmt: skip
        summed = chosen.accumulate(
            host,
            parameters,
            given,
            self.term,
            device=torch.device("cpu") if self.offload_scores else None,
            clip=self.clip,
        )
        chosen.choose(host, name, budgets, lambda path: self.decrease(summed[path]))

    def term(self, gradient: Tensor) -> Tensor:
        """What of a batch's gradient is summed: itself, with its sign."""
        return gradient

    def decrease(self, summed: Tensor) -> Tensor:
        """What entries are ranked by: |g|, in the order of the decrease g² / (2 h), which would lose small numbers."""
        return summed.abs()

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """The usual one, over vectors of the chosen entries."""
        chosen.check_chosen(host, name, self.id)
        return make(host.parameters(name))

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Refuse to train a head alone, in a loop that did not call `prepare`."""
        chosen.check_chosen(host, name, self.id)
