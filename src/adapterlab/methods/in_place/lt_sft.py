"""LT-SFT: train everything, then again only the entries that moved most; the sparse changes add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.adapter import Copy
from adapterlab.core.carrier import Carrier
from adapterlab.engine.sparse import Vector
from adapterlab.errors import AttachError
from adapterlab.methods.in_place import _chosen_parameters as chosen
from adapterlab.methods.in_place import _one_vector as one_vector
from adapterlab.methods.in_place._two_phases import TwoPhases
from adapterlab.optim import Span, master, steps_of
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class LTSFT(TwoPhases):
    """Find the entries that training moves most, go back to the start, and train those alone.

    Phase 1: θ₁ = train(θ₀), all entries. M = the K entries with the largest |θ₁ − θ₀|, over all tensors together.
    Phase 2: from θ₀ again, θ₂ = train(θ₀) with the entries of M alone. What is kept is δ = θ₂ − θ₀, K numbers.

    Changes of several tasks and languages add up: `adapterlab combine` with `--weights 1,1` makes one sparse adapter of
    a language's and a task's, θ = θ₀ + δ_task + δ_language, and says how much their entries overlap. Train a task with
    the source language's adapter live beneath it (as base or merged) to keep it out of δ.

    `l1` λ adds (λ / N) Σ |θᵢ − θ₀ᵢ| over what trains, N the number of all the model's parameters.

    Where it attaches: all parameters, a tied one once; not the normalisation layers, unless `norms` is on. Modules in
    `modules_to_save` train whole in both phases and begin the second one anew as well.

    Start: the base's values, at the beginning of either phase. Optimizer and learning rate begin anew too: each phase
    has the schedule of a whole run.

    Trainable parameters: N in phase 1, then K = ⌊ρ N⌋.

    Memory: phase 1 that of full fine-tuning, and the original values; phase 2 36 bytes for each entry (value, gradient,
    moments, place, original), and the gradient of one tensor at a time.

    Inference: nothing to merge, no cost.

    Rate: 5e-5, the authors' for languages and most tasks, in both phases.

    Reference: "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", arXiv 2110.07560.

    Example:
        >>> from adapterlab.methods.in_place.lt_sft import LTSFT
        >>> LTSFT(dense=0.25).first(1000)
        250
    """

    formula: ClassVar[str] = "all parameters, then ⌊ρ N⌋"

    density: float = Field(0.05, gt=0, lt=1, description="share ρ of the entries that train in the second phase")
    dense: Span = Field(
        0.5,
        description="steps of the first phase, in which all entries train: a number, or a share of the run (below 1)",
    )
    l1: float = Field(0.0, ge=0, description="strength λ of the pull of all that trains towards the base")
    norms: bool = Field(False, description="let the normalisation layers take part; the authors freeze them")
    exclude: tuple[str, ...] = Field((), description="modules to leave frozen: roles, names or patterns")

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Keep few entries, those that moved clearly more than others in one step."""
        return {"density": 0.002, "dense": 1}

    # ------------------------------------------------------------------ structure

    def attach(self, host: Carrier, name: str) -> None:
        """Own everything, with room for the entries that will be chosen.

        Raises:
            AttachError: there would be none.
        """
        parameters = self.whole(host)
        total = sum(p.numel() for p in parameters.values())
        count = int(self.density * total)
        if not count:
            raise AttachError(
                f"{self.id}: density={self.density} of {total:,} entries leaves none to train. Raise density, or "
                "exclude less."
            )
        one_vector.attach(host, name, parameters, count, entire=True)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach in the phase that it was saved in."""
        one_vector.attach_saved(host, name, self.whole(host), tensors)

    def with_entries(self, host: Carrier, entries: Mapping[str, tuple[Tensor, Tensor]]) -> Mapping[str, Tensor] | None:
        """Any entries of the parameters that may be chosen from."""
        return one_vector.saved_with(self.whole(host), entries)

    def whole(self, host: Carrier) -> dict[str, nn.Parameter]:
        """Return the parameters that entries are chosen from."""
        found = chosen.eligible(host, self.id, (*self.exclude, *self.modules_to_save))
        if self.norms:
            return found
        norms = {id(p) for s in host.all_sites() if s.kind == "norm" for p in s.module._parameters.values()}
        return {path: p for path, p in found.items() if id(p) not in norms}

    def held(self, host: Carrier, name: str) -> Sequence[Vector]:
        """The vector of the entries."""
        return (one_vector.of(host, name),)

    # ------------------------------------------------------------------ the run

    def first(self, steps: int) -> int:
        """Number of steps of the first phase."""
        return steps_of(self.dense, steps)

    def span(self) -> str:
        """The setting, for messages."""
        return f"dense={self.dense}"

    def rate(self, step: int, steps: int, plain: Callable[[float], float]) -> float:
        """The trainer's schedule once for each phase."""
        first = self.first(steps)
        start, length = (0, first) if step < first else (first, steps - first)
        return plain((step - start) * steps / length)

    @torch.no_grad()
    def choose(self, host: Carrier, name: str, optimizer: Optimizer) -> None:
        """The entries that moved most begin again where they began, and heads too."""
        vector = one_vector.of(host, name)
        found = chosen.top(vector.paths, self.moved(host, name, optimizer), len(vector.values))
        vector.choose(vector.positions(found), one_vector.original(host, name, vector, found))
        self.rewind_heads(host, name)

    def rewind_heads(self, host: Carrier, name: str) -> None:
        """What trains whole begins again where it began."""
        for adapter in host.adapters(name).values():
            if isinstance(adapter, Copy):
                adapter.copy.load_state_dict(adapter.site.module.state_dict(), strict=False)

    def moved(self, host: Carrier, name: str, optimizer: Optimizer) -> chosen.Score:
        """|θ₁ − θ₀| of each entry."""

        def score(path: str) -> Tensor:
            now = master(optimizer, host.model.get_parameter(path)).detach().float()
            return (now - host.patches[name][path].original.float()).abs().flatten()

        return score

    def penalty(self, host: Carrier, name: str) -> Tensor | None:
        """(λ / N) Σ |θ − θ₀| over what trains."""
        if not self.l1:
            return None
        total = sum(p.numel() for p in host.base_parameters().values())
        vector, patches = one_vector.of(host, name), host.patches[name]
        if vector.values.requires_grad:
            start = torch.cat([patches[path].original for path in vector.paths]).to(vector.values)
            found = (vector.values - start).abs().sum()
        else:
            pairs = [(host.model.get_parameter(path), patch.original) for path, patch in patches.items()]
            found = torch.stack([(p - start).abs().float().sum() for p, start in pairs]).sum()
        return self.l1 / total * found

    def outcome(self, host: Carrier, name: str) -> dict[str, str]:
        """How many entries were chosen, and where."""
        vector = one_vector.of(host, name)
        if not vector.chosen:
            return {"entries": "none chosen: the run ended in its first phase, and the adapter holds all of them"}
        parts = [len(vector.part(path).places()) for path in vector.paths]
        share = len(vector.values) / vector.offsets[-1]
        return {"entries": f"{len(vector.values):,} ({share:.2%}), in {sum(map(bool, parts))} of {len(parts)} tensors"}
