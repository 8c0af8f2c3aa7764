"""FishMask: train the entries with the largest Fisher information."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from rich.progress import track
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Batches, MakeOptimizer, Method
from adapterlab.errors import ConfigError
from adapterlab.methods.in_place import _chosen_parameters as chosen
from adapterlab.registry import register
from adapterlab.terminal import Terminal

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class FishMask(Method):
    """Choose once, before training, the share ρ of all base entries that the loss depends on most; train only those.

    Score of entry i: F_i = Σ_j (∂ log p(y_j | x_j) / ∂θ_i)², over single samples. The k highest train, in place.

    Where it attaches: all parameters, embeddings, norms and biases included, a tied one once; one top-k over all of
    them. Nothing trains until `prepare` has seen data (selection by magnitude or at random needs none).

    Start: the base's values.

    Trainable parameters: ⌊ρ N⌋ of N, a new head in `modules_to_save` included (its entries are charged to the budget
    unless `charge_head` is off). With scope `tensor`: the sum of ⌊ρ N_t⌋ over the tensors.

    Inference: nothing to merge, no cost. Memory: 20 bytes for each trained entry; the gradient of one tensor at a time.
    During scoring 4 bytes for each entry of the base.

    One sample of a language model is one row, and its loss the mean over its target tokens. Scores are computed in eval
    mode.

    Rate: 1e-4, the largest that the authors try, beside 5e-5 and 1e-5; without weight decay.

    Reference: "Training Neural Networks with Fixed Sparse Masks", arXiv 2111.09839.

    Example:
        >>> from adapterlab.methods.in_place.fish_mask import FishMask
        >>> FishMask(density=0.01).samples
        1024
    """

    formula: ClassVar[str] = "⌊ρ N⌋"

    density: float = Field(0.005, gt=0, le=1, description="share ρ of the entries that train")
    samples: int = Field(1024, ge=1, description="rows that the scores are computed from, one backward pass each")
    selection: Literal["fisher", "magnitude", "random"] = Field(
        "fisher", description="what an entry is scored by; the last two need no data and are baselines"
    )
    target: Literal["label", "expect"] = Field(
        "label", description="gradient of the true label, or the expectation over the model's own (classifiers only)"
    )
    power: Literal["square", "absolute"] = Field("square", description="what of a gradient is summed")
    scope: Literal["global", "tensor"] = Field("global", description="one top-k over all tensors, or one for each")
    exclude: tuple[str, ...] = Field((), description="modules to leave frozen: roles, names or patterns")
    charge_head: bool = Field(True, description="count the entries of modules_to_save towards the budget")
    offload_scores: bool = Field(False, description="keep the scores in main memory while they are computed")
    seed: int = Field(0, ge=0, lt=1 << 31, description="of the random selection")

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Train one entry in twenty, chosen on few rows."""
        return {"density": 0.05, "samples": 8}

    def attach(self, host: Carrier, name: str) -> None:
        """Check that there is something to choose, and choose at once if no data is needed."""
        parameters = self.eligible(host)
        budgets = self.budgets(host, parameters)
        if self.selection == "magnitude":
            chosen.choose(host, name, budgets, chosen.magnitude(parameters))
        elif self.selection == "random":
            chosen.choose(host, name, budgets, chosen.noise(parameters, self.seed))

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Train the entries that were chosen when the adapter was saved."""
        saved = chosen.saved_entries(tensors)
        if not saved:
            self.attach(host, name)
        chosen.own_entries(host, name, saved)

    def prepare(self, host: Carrier, name: str, batches: Batches) -> None:
        """Score all entries and choose; an adapter that has its entries keeps them."""
        if chosen.is_chosen(host, name):
            return
        parameters = self.eligible(host)
        given = chosen.rows(batches, self.samples)
        shown = track(given, "scoring", self.samples, transient=True, console=Terminal(stderr=True))
        scores = chosen.accumulate(
            host,
            parameters,
            shown,
            torch.square if self.power == "square" else torch.abs,
            losses=_every_class if self.target == "expect" else chosen.own_loss,
            device=torch.device("cpu") if self.offload_scores else None,
        )
        chosen.choose(host, name, self.budgets(host, parameters), lambda path: scores[path])

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """The usual one, over vectors of the chosen entries."""
        chosen.check_chosen(host, name, self.id)
        return make(host.parameters(name))

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Refuse to train a head alone, in a loop that did not call `prepare`."""
        chosen.check_chosen(host, name, self.id)

    def eligible(self, host: Carrier) -> dict[str, nn.Parameter]:
        """Return the parameters that entries are chosen from."""
        return chosen.eligible(host, self.id, (*self.exclude, *self.modules_to_save))

    def budgets(self, host: Carrier, parameters: Mapping[str, nn.Parameter]) -> list[chosen.Budget]:
        """Return groups of parameters with the number of entries to choose in each.

        Raises:
            AttachError: that leaves no entry.
        """
        if self.scope == "tensor":
            left = chosen.share_of_each(parameters, self.density)
        else:
            k = chosen.share_of_all(host, parameters, self.density, exclude=self.exclude, charge_head=self.charge_head)
            left = [(list(parameters), k)] if k > 0 else []
        if not left:
            raise chosen.none_left(self.id, self.density, parameters)
        return left


def _every_class(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, float]]:
    """The loss of each possible label of one row, weighted with the model's probability for it."""
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    if logits.dim() != 2:
        raise ConfigError(
            "fish_mask: target='expect' sums over all labels, which only a classifier of whole rows has; this model's "
            f"logits are {list(logits.shape)}. Use target='label'."
        )
    logs = logits.float().log_softmax(-1)[0]
    for log in logs:
        yield -log, float(log.detach().exp())
