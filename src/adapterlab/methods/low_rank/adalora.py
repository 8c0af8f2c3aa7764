"""Low-rank updates in the form of a singular value decomposition, whose ranks are shared out during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from adapterlab.core.adapter import Delta
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import LayerMethod, MakeOptimizer
from adapterlab.core.site import Site
from adapterlab.errors import ConfigError, NotTrainingError
from adapterlab.foreign.roles import ranks_by_role
from adapterlab.optim import Span, steps_of
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer

_TENSORS = ("A", "B", "E")


def _outward(method: Any, layers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Write what is left, with PEFT's list of which triplets those are; PEFT wants to know a run's steps as well."""
    steps = next((layer.steps for layer in layers.values()), None)
    if steps is None and isinstance(method.tinit, int) and isinstance(method.tfinal, int):
        steps = method.tinit + method.tfinal + 1
    first, last = method.phases(steps) if steps is not None else (0, 1)
    steps = steps if steps is not None else 1
    options = {"tinit": first, "tfinal": steps - last, "total_step": steps, "init_lora_weights": True}
    pruned = any(not bool(layer.kept.all()) for layer in layers.values())
    if pruned:
        options["rank_pattern"] = {f"{path}.lora_E": layer.kept.tolist() for path, layer in layers.items()}
    tensors = {}
    for path, layer in layers.items():
        mask = layer.kept if len(layer.A) == len(layer.kept) else torch.ones(len(layer.A), dtype=torch.bool)
        mask = mask.to(layer.A.device)
        tensors[path] = {"A": layer.A[mask], "B": layer.B[:, mask], "E": layer.E[mask]}
    return options, tensors


def _inward(method: Any, site: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read what is left at one module; averages begin anew."""
    if not {*_TENSORS} <= tensors.keys():
        return tensors
    averages = {f"{key}_{of}": torch.zeros_like(tensors[key]) for key in _TENSORS for of in ("mean", "spread")}
    return {**tensors, **averages, "kept": torch.arange(method.init_r) < len(tensors["A"])}


@register
class AdaLoRA(LayerMethod):
    """Write each update as P Λ Q and prune triplets by importance, so that the ranks go where they are needed.

    y = W x + b + s · B diag(E) A x with A = Q `[r, in]`, B = P `[out, r]`, E = Λ `[r, 1]` and s = alpha / r, r being
    `init_r` for ever, also when fewer triplets are left.

    The extra loss `orth_reg_weight` · mean over all A and B of ‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F keeps triplets apart.

    After step t of T each entry w has the sensitivity I = |w · ∂loss/∂w|, its average Ī ← β₁ Ī + (1 − β₁) I and the
    average of its changes U ← β₂ U + (1 − β₂) |I − Ī|; its importance is Ī · U. That of a triplet is the importance of
    its E, and the means over its row of A and its column of B.

    The budget of triplets in all n modules is n · init_r in the first `tinit` steps, n · target_r in the last `tfinal`,
    and b = n target_r + n (init_r − target_r) (1 − (t − tinit) / (T − tinit − tfinal))³ in between, where every
    `delta_t` steps the E of all but the b most important triplets become 0. They still get a gradient and may come
    back, until the last `tfinal` steps, which train what is left then. At the end the others are cut off. T is the
    number of steps of the run; a run that ends before its last phase keeps all triplets.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too). The paper takes all of them.

    Start: E = 0, so the first output equals the base's; A and B are normal with standard deviation 0.02.

    Trainable parameters: init_r (in + out + 1) for each module while it trains, rank · (in + out + 1) afterwards.

    Inference: W + s B diag(E) A can be merged, at no cost; `adapterlab export --as lora` writes a plain LoRA with the
    rank that each module kept.

    Memory: two averages for each trained number, beside the optimizer's. Cost of a step: that of LoRA of rank init_r,
    the penalty's init_r² (in + out) and the elementwise work of the averages. E has no weight decay.

    Rate: 1e-3, within the 5e-4 to 1.2e-3 of the authors' runs, which have init_r = 1.5 · target_r.

    Reference: "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512.

    Example:
        >>> from adapterlab.methods.low_rank.adalora import AdaLoRA
        >>> AdaLoRA(init_r=6, target_r=4, tinit=10, tfinal=30).budget(20, 100, 16)
        82
    """

    formula: ClassVar[str] = "init_r (in + out + 1)"

    init_r: int = Field(12, ge=1, description="rank of each module at the start")
    target_r: int = Field(8, ge=1, description="mean rank of the modules at the end")
    alpha: float = Field(32.0, gt=0, description="scale numerator; it is divided by init_r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    tinit: Span = Field(
        0.15, description="steps before the first pruning: a number (integer), or a share of the run (below 1)"
    )
    tfinal: Span = Field(0.45, description="steps after the last pruning: likewise")
    delta_t: int = Field(1, ge=1, description="steps between two prunings")
    beta1: float = Field(0.85, gt=0, lt=1, description="decay of the average of the sensitivities")
    beta2: float = Field(0.85, gt=0, lt=1, description="decay of the average of their changes")
    orth_reg_weight: float = Field(0.1, ge=0, description="weight of the extra loss that keeps triplets orthogonal")

    hf: ClassVar[HFCodec | None] = HFCodec(
        "ADALORA",
        fields={
            "init_r": "init_r", "target_r": "target_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
            "tinit": "tinit", "tfinal": "tfinal", "delta_t": "deltaT", "beta1": "beta1", "beta2": "beta2",
            "orth_reg_weight": "orth_reg_weight",
        },
        tensors={"A": "lora_A", "B": "lora_B", "E": "lora_E"},
        accepts={"init_lora_weights": (True, False, "gaussian"), "bias": ("none",)},
        # How long the run is is known here without it, a pattern is in the shapes, and PEFT itself leaves out the rest.
        ignores=("total_step", "rank_pattern", "r", "alpha_pattern", "use_rslora"),
        outward=_outward,
        inward=_inward,
    )  # fmt: skip

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.target_r > self.init_r:
            raise ValueError(f"target_r={self.target_r} is above init_r={self.init_r}; choose 1 to {self.init_r}")
        if isinstance(self.tinit, float) and isinstance(self.tfinal, float) and self.tinit + self.tfinal >= 1:
            raise ValueError(f"tinit={self.tinit} and tfinal={self.tfinal} leave no share of the run for pruning")
        return self

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Prune in a run of a few steps."""
        return {"init_r": 4, "target_r": 2, "tinit": 0.25, "tfinal": 0.25}

    # ------------------------------------------------------------------ attaching and saving

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach with the rank that each module has."""
        self.attach(host, name)
        for path, layer in self.layers(host, name).items():
            saved = tensors.get(f"adapter.{path}.A")
            if saved is not None and len(saved) < len(layer.A):
                layer.cut(torch.arange(len(layer.A), device=layer.A.device) < len(saved))

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """Without weight decay of E, which would blur the importance."""
        values = {id(layer.E) for layer in self.layers(host, name).values()}
        groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for p in host.parameters(name):
            groups[id(p) in values].append(p)
        decayed: list[dict[str, Any]] = [{"params": groups[False]}, {"params": groups[True], "weight_decay": 0.0}]
        return make(decayed)

    # ------------------------------------------------------------------ training

    def begin(self, host: Carrier, name: str, steps: int) -> None:
        """Fit the schedule into the run.

        Raises:
            ConfigError: no step of it is left for pruning.
        """
        layers = self.layers(host, name).values()
        first, last = self.phases(steps)
        if first >= last and not any(layer.is_cut for layer in layers):
            raise ConfigError(
                f"adalora: tinit={self.tinit} and tfinal={self.tfinal} are {first} and {steps - last} steps, which "
                f"leave none of this run's {steps} for pruning. Lower them to less than {steps} together, or give "
                "shares of the run, such as tinit=0.15 and tfinal=0.45."
            )
        for layer in layers:
            layer.steps = steps

    def phases(self, steps: int) -> tuple[int, int]:
        """Return after which steps of a run pruning begins and ends."""
        return steps_of(self.tinit, steps), steps - steps_of(self.tfinal, steps)

    def budget(self, t: int, steps: int, n: int) -> int:
        """Return how many triplets of n modules are kept after step t of a run."""
        first, last = self.phases(steps)
        most, least = n * self.init_r, n * self.target_r
        if t <= first:
            return most
        left = max(0.0, 1 - (t - first) / (last - first))
        return int(least + (most - least) * left**3)

    def penalty(self, host: Carrier, name: str) -> Tensor | None:
        """The weighted mean distance of the factors from being orthogonal."""
        if not self.orth_reg_weight:
            return None
        apart = [distance for layer in self.layers(host, name).values() for distance in layer.apart()]
        return self.orth_reg_weight * torch.stack([d.to(apart[0].device) for d in apart]).mean()

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Refuse a loop that did not say how long it is."""
        if any(layer.steps is None for layer in self.layers(host, name).values()):
            raise NotTrainingError(
                f"The adalora adapter {name!r} does not know how many steps the run has, so its budget cannot fall. "
                f"Call host.methods[{name!r}].begin(host, {name!r}, steps) before the first one; adapterlab's loop "
                "and AdapterlabCallback do it by themselves."
            )

    @torch.no_grad()
    def after_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Judge the triplets, and keep to the budget."""
        layers = list(self.layers(host, name).values())
        steps = layers[0].steps
        assert steps is not None
        t, (first, last) = step + 1, self.phases(steps)
        if any(layer.is_cut for layer in layers):
            return
        for layer in layers:
            if t < last:
                layer.judge(self.beta1, self.beta2)
            elif t > last:
                layer.keep(layer.kept)  # momentum would bring the others back
        if t == last or (first < t < last and t % self.delta_t == 0):
            masks = best([layer.importance() for layer in layers], self.budget(t, steps, len(layers)))
            for layer, mask in zip(layers, masks, strict=True):
                layer.keep(mask)
                if t == last:
                    layer.settle(mask)

    def finish(self, host: Carrier, name: str) -> None:
        """Cut off what was pruned."""
        for layer in self.layers(host, name).values():
            if not layer.is_cut:
                layer.cut(layer.kept.clone())

    def outcome(self, host: Carrier, name: str) -> dict[str, str]:
        """The ranks that the modules kept."""
        return ranks_by_role({path: int(layer.kept.sum()) for path, layer in self.layers(host, name).items()})

    def layers(self, host: Carrier, name: str) -> dict[str, AdaLoRA.Layer]:
        """Return the adapter's parts by path."""
        return {path: a for path, a in host.adapters(name).items() if isinstance(a, AdaLoRA.Layer)}

    class Layer(Delta):
        """The triplets at one module.

        Attributes:
            A: Q `[r, in]`.
            B: P `[out, r]`.
            E: Λ `[r, 1]`.
            A_mean: Ī of A; A_spread: U of A; likewise for B and E.
            kept: which of the triplets at the start are left `[init_r]`; all, until that is decided.
            steps: of the run, once it is known.
        """

        casts: ClassVar[bool] = False
        kept: Tensor

        def __init__(self, method: AdaLoRA, site: Site):
            super().__init__(site)
            r = method.init_r
            self.scale, self.p = method.alpha / (r + 1e-5), method.dropout
            self.A, self.B = site.parameter(r, site.shape[1]), site.parameter(site.shape[0], r)
            self.E = site.parameter(r, 1)
            nn.init.normal_(self.A, std=0.02)
            nn.init.normal_(self.B, std=0.02)
            for key in _TENSORS:
                for average in ("mean", "spread"):
                    self.register_buffer(f"{key}_{average}", torch.zeros_like(getattr(self, key)))
            self.register_buffer("kept", torch.ones(r, dtype=torch.bool, device=site.device))
            self.steps: int | None = None

        @property
        def is_cut(self) -> bool:
            """Whether triplets were cut off."""
            return len(self.A) < len(self.kept)

        def factors(self) -> tuple[Tensor, Tensor]:
            """Λ Q and P."""
            return self.E * self.A, self.B

        def apart(self) -> list[Tensor]:
            """‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F."""
            return [
                torch.linalg.matrix_norm(m @ m.T - torch.eye(len(m), dtype=m.dtype, device=m.device))
                for m in (self.A, self.B.T)
                if len(m)
            ]

        def judge(self, beta1: float, beta2: float) -> None:
            """Take the sensitivities of this step into the averages."""
            for key in _TENSORS:
                w, mean, spread = (getattr(self, f"{key}{of}") for of in ("", "_mean", "_spread"))
                if w.grad is not None:
                    # With loss scaling an overflow leaves gradients that say nothing.
                    now = (w * w.grad).abs().nan_to_num(0, posinf=0)
                    mean.lerp_(now, 1 - beta1)
                    spread.lerp_((now - mean).abs(), 1 - beta2)

        def importance(self) -> Tensor:
            """Of each triplet `[r]`."""
            a, b, e = (getattr(self, f"{key}_mean") * getattr(self, f"{key}_spread") for key in _TENSORS)
            return e[:, 0] + a.mean(1) + b.mean(0)

        def keep(self, mask: Tensor) -> None:
            """Set the others to zero."""
            self.E.mul_(mask[:, None])

        def settle(self, mask: Tensor) -> None:
            """Decide for good; what it was decided by is not needed any more."""
            self.kept.copy_(mask)
            for key in _TENSORS:
                getattr(self, f"{key}_mean").zero_()
                getattr(self, f"{key}_spread").zero_()

        @torch.no_grad()
        def cut(self, mask: Tensor) -> None:
            """Leave only some of the triplets."""
            if bool(mask.all()):
                return
            for key in _TENSORS:
                for of in ("", "_mean", "_spread"):
                    value = getattr(self, f"{key}{of}")
                    left = (value[:, mask] if key == "B" else value[mask]).detach().clone()
                    setattr(self, f"{key}{of}", left if of else nn.Parameter(left))
            self.kept.copy_(mask)


def best(scores: list[Tensor], count: int) -> list[Tensor]:
    """Return which of the scores of several modules are among the largest; of equal ones those that come last."""
    every = torch.cat([score.detach().cpu() for score in scores])
    kept = torch.ones(len(every), dtype=torch.bool)
    kept[torch.argsort(every, stable=True)[: len(every) - count]] = False
    parts = kept.split([len(score) for score in scores])
    return [part.to(score.device) for part, score in zip(parts, scores, strict=True)]
