"""A mixture of saved LoRAs, found for a few examples without gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import MakeOptimizer
from adapterlab.engine.modes import evaluating
from adapterlab.errors import ConfigError, NotTrainingError
from adapterlab.methods.mixture._library import MixedLibrary, Place, Update, check_ranks, check_targets, mixed
from adapterlab.methods.mixture._search import WORST, Search
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer

_ROUNDING = 1e-6  # of a coefficient at the bound, in float32


@register
class LoRAHub(MixedLibrary):
    """Search N coefficients for N saved low-rank adapters with a few examples of a new task, without gradients.

    `factors`: Â = Σ_i w_i A_i, B̂ = Σ_i w_i s_i B_i, ΔW = B̂ Â, of the rank that all adapters have. It is quadratic in
    w and has products w_i w_j of one adapter's B with another's A, so w and −w are the same, and the sign of one w_i
    means nothing by itself. `deltas`: ΔW = Σ_i w_i s_i B_i A_i, linear in w, of rank Σ r_i; ranks and targets may
    differ.

    A run of training searches: of J(w) = mean cross-entropy of the examples + `penalty_weight` · mean_i |w_i|, with
    |w_i| ≤ `bound`, each step is one evaluation, a forward pass in evaluation mode on all examples. The first one is
    w = 0, the model as it is, which stays a candidate; then a (1+1) evolution strategy with the one-fifth rule goes on
    from the best w so far, with steps of σ = `sigma` at first. (The authors call a library that picks a strategy; their
    loss is divided by batches and not by tokens, which makes its weight beside the penalty depend on the batch size.)
    `budget` is the number of evaluations, or training.steps where that is less; with training.epochs an epoch is an
    evaluation. Evaluation rows choose the best checkpoint, as in any run.

    Few examples make a lottery of it: search with several seeds and look at all of them, and at the average of the
    adapters and the best single one.

    Where it attaches: at the linear layers of the `adapters`. These are folders of trained adapters or of their runs,
    or names of adapters on the model. Any method whose update is low-rank will do; heads that they trained are left
    behind.

    Start: w = 0, the base's output, or `coefficients`.

    Trainable parameters: 0 by gradients; N numbers are searched.

    Inference: W + ΔW can be merged, at no cost. Saved it is a plain LoRA of HF PEFT, which needs the folders no more.

    Cost of a step: a forward pass, and the memory of inference with the N adapters beside it.

    Rate: 5e-4, that of LoRA; here nothing has a rate.

    Reference: "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition", arXiv 2307.13269.

    Example:
        >>> from adapterlab.methods.mixture.lorahub import LoRAHub
        >>> LoRAHub(adapters={"math": "runs/math", "code": "runs/code"}).steps_of_run(None)
        40
    """

    formula: ClassVar[str] = "0"

    coefficients: dict[str, float] | None = Field(
        None, description="w_i by the name of the part, to start from; a search puts here what it found; default: 0"
    )
    mix: Literal["factors", "deltas"] = Field(
        "factors", description="what the coefficients weigh: A and B each by itself, or the changes of the weights"
    )
    budget: int = Field(40, ge=2, description="evaluations of a search")
    examples: int | None = Field(
        5, ge=1, description="training rows that the search looks at, drawn by the seed; null: all"
    )
    penalty_weight: float = Field(0.05, ge=0, description="weight of mean |w_i| in what is minimised")
    bound: float = Field(1.5, gt=0, description="largest |w_i|")
    sigma: float = Field(0.5, gt=0, description="deviation of the first steps of the search")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = self.coefficients
        if given is not None and given.keys() != self.adapters.keys():
            raise ValueError(f"coefficients={given} should name the same parts as adapters: {', '.join(self.adapters)}")
        if given is not None and any(abs(w) > self.bound * (1 + _ROUNDING) for w in given.values()):
            raise ValueError(f"coefficients={given} leave the box of bound={self.bound:g}: raise it, or lower them")
        return self

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Two adapters with random values, and coefficients as a search leaves them."""
        return {**super().example(model), "coefficients": {"one": 0.9, "two": -0.8}}

    @property
    def weights(self) -> dict[str, float]:
        """The coefficients w_i."""
        return self.coefficients or dict.fromkeys(self.adapters, 0.0)

    def check(self, places: Mapping[str, Place]) -> None:
        """Mixed factors have to be of one form."""
        if self.mix == "factors":
            check_targets(self.id, self.adapters, places, ", or take mix=deltas, for which they may differ")
            check_ranks(self.id, places, ", or take mix=deltas, for which they may differ")

    def mixture(self, updates: Mapping[str, Update]) -> tuple[Tensor, Tensor]:
        """The mixture at one module."""
        return mixed(updates, self.weights, self.mix)

    def attach(self, host: Carrier, name: str) -> None:
        """Mix the adapters with the coefficients."""
        super().attach(host, name)
        host.settle(name, self.replace(coefficients=self.weights))

    # ------------------------------------------------------------------ the search

    def steps_of_run(self, asked: int | None) -> int | None:
        """The budget, or fewer if fewer are asked for."""
        return self.budget if asked is None else min(asked, self.budget)

    def rows_of_run(self, count: int) -> int | None:
        """The examples."""
        return count if self.examples is None else min(count, self.examples)

    def begin(self, host: Carrier, name: str, steps: int) -> None:
        """Refuse to search with one evaluation, which is that of the model as it is."""
        if steps < 2:
            raise ConfigError(
                f"{self.id}: {steps} evaluation(s) are no search: the first one is of the model as it is. Set "
                f"training.steps to the number of evaluations (the authors take 40), and leave epochs out."
            )

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """Open the adapters, and make the search over their coefficients."""
        places, layers = self.places(host, name), self.layers(host, name)
        parts = list(self.adapters)

        def become(point: Tensor) -> None:
            method = self.replace(coefficients=dict(zip(parts, point.tolist(), strict=True)))
            for path, place in places.items():
                layers[path].take(*method.mixture(place.updates))
            host.settle(name, method)

        start = torch.tensor(list(self.weights.values()), device=next(iter(layers.values())).A.device)
        search = Search(start, become, bound=self.bound, sigma=self.sigma)
        for layer in layers.values():
            layer.__dict__["search"] = search
        return search

    def search(self, host: Carrier, name: str) -> Search | None:
        """The search that goes on, if one does."""
        return next((layer.__dict__.get("search") for layer in self.layers(host, name).values()), None)

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Try the next candidate."""
        assert isinstance(optimizer, Search)
        optimizer.ask()

    def gradient(
        self, host: Carrier, name: str, loss: Callable[[], Tensor], backward: Callable[[Tensor], None]
    ) -> Tensor:
        """Compute the loss of a batch alone, without dropout; its sum over the batches is what the search hears."""
        search = self.search(host, name)
        with evaluating(host.model):
            value = loss()
        if search is not None:
            search.hear(float(value))
        return value.nan_to_num(WORST, WORST, WORST)

    def size(self, point: Tensor) -> float:
        """What a candidate costs beside its loss: weight · mean_i |w_i|."""
        return self.penalty_weight * float(point.abs().mean())

    def after_backward(self, host: Carrier, name: str, step: int) -> None:
        """The candidate's loss is complete, and so is J."""
        if (search := self.search(host, name)) is not None:
            search.judge(self.size(search.point.detach()))

    def after_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Between steps the adapter is the best one so far: that is what is saved and evaluated."""
        assert isinstance(optimizer, Search)
        optimizer.rest()

    def finish(self, host: Carrier, name: str) -> None:
        """Become the best mixture that was found, also of a run that was continued behind its last step.

        Raises:
            NotTrainingError: the coefficients made no difference.
        """
        search = self.search(host, name)
        if search is None:
            return
        search.rest()
        if search.held["count"] > 1 and not search.held["moved"]:
            raise NotTrainingError(
                f"{self.id}: all {search.held['count']} candidates have the loss {search.held['heard']:g}: the "
                "adapters change nothing here. Check that they are trained, and that the model runs what they adapt."
            )

    def outcome(self, host: Carrier, name: str) -> dict[str, str]:
        """What the search found."""
        search = self.search(host, name)
        found = host.methods[name].weights if name in host.methods else {}
        told = {"coefficients": ", ".join(f"{part} {w:.3g}" for part, w in found.items())}
        if search is not None:
            held = search.held
            told["objective"] = (
                f"{held['value']:.4f} after {held['count']} evaluations; {held['first']:.4f} of the model as it is"
            )
        return told
