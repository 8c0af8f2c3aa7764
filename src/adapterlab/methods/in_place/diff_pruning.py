"""Diff pruning: learn a dense change with gates that close under a penalty, then keep and train its largest entries."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import MakeOptimizer, Method
from adapterlab.core.site import Site
from adapterlab.engine.substitute import Substitute
from adapterlab.errors import AttachError, ConfigError, NotTrainingError
from adapterlab.foreign.sharding import read, write
from adapterlab.methods.in_place import _chosen_parameters as chosen
from adapterlab.optim import steps_of
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer

_CERTAIN = 50.0  # a gate this far from 0 is 0 or 1 to the bit, whatever is drawn
_LEAST = 1e-4  # of what is drawn from (0, 1), and of its distance from 1


@register
class DiffPruning(Method):
    """Learn δ = z ⊙ w with random gates z that a penalty closes; then keep the share ρ of the largest and train those.

    First phase, the share `search` of the run's steps: θ = θ₀ + z ⊙ w for every entry, in each step with new
    z = clamp(s (r − l) + l, 0, 1), s = σ(log u − log(1 − u) + α), u ~ U(0, 1), the hard-concrete distribution stretched
    to (l, r) = (`low`, `high`). w and α train; P(z > 0) = σ(α − log(−l / r)). With `structured` each tensor g has one
    more gate: δ = z ⊙ z_g w. The penalty is λ Σ P(z_i > 0) P(z_g > 0) over all entries (`product`, the paper's), or
    λ (Σ P(z_i > 0) + Σ P(z_g > 0)) (`sum`, that of the authors' code).

    Then z is drawn once more, the ⌊ρ N⌋ entries with the largest |δ| of all tensors together are kept, and the others
    are the base's again. Second phase: those train on, from δ, without gates and penalty, with a new optimizer and a
    schedule of the rate of its own, at `second_rate` times the rate.

    Where it attaches: all parameters, embeddings, norms and biases included, a tied one once. A new head in
    `modules_to_save` trains whole, without gates.

    Start: w = 0, so the base's values; all α are `start`, so gates are open at first.

    Trainable parameters: while it trains two for each of N entries, and one for each tensor if structured; ⌊ρ N⌋ in the
    end, kept as values with their positions. An adapter that is saved earlier holds w and α of all entries. A run that
    stops in the first phase keeps the ⌊ρ N⌋ largest, without the second.

    Inference: nothing to merge, no cost. Outside of training gates are z = clamp(σ(α) (r − l) + l, 0, 1).

    Memory: the saving is in what is stored, not in training: w and α with their gradients and moments are 32 bytes for
    each entry beside the base in the first phase, and 20 in the second; leave modules out by `exclude`.
    Values of θ are made for one module at a time, and again in the backward pass. Gates are drawn from `seed`, the
    tensor's name and the step, so they are the same for all parts of a step, on all processes and after a stop.

    The gates' rate is `gate_lr` and constant in the first phase: at the rate of w they would never close. They have no
    weight decay; that of w pulls towards the base.

    Rate: 1e-5, the authors', with batches of 8 and three epochs for each phase.

    Reference: "Parameter-Efficient Transfer Learning with Diff Pruning", arXiv 2012.07463.

    Example:
        >>> from adapterlab.methods.in_place.diff_pruning import DiffPruning
        >>> DiffPruning(search=0.5).first(100)
        50
    """

    formula: ClassVar[str] = "two for each entry and one a tensor, then ⌊ρ N⌋"

    density: float = Field(0.005, gt=0, le=1, description="share ρ of the entries that are kept")
    search: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="steps with gates: a number (integer), or a share of the run (below 1)"
    )
    structured: bool = Field(True, description="one more gate for each tensor")
    penalty_form: Literal["product", "sum"] = Field(
        "product", description="entries and tensors in the penalty: as in the paper, or as in the authors' code"
    )
    sparsity: float = Field(1.25e-7, ge=0, description="weight λ of the expected number of open gates, a sum over all")
    low: float = Field(-1.5, lt=0, description="lower end l of the interval that gates are stretched to")
    high: float = Field(1.5, gt=1, description="upper end r")
    start: float = Field(5.0, gt=-_CERTAIN, lt=_CERTAIN, description="value that all α start at")
    gate_lr: float = Field(0.1, gt=0, description="learning rate of α, constant")
    second_rate: float = Field(5.0, gt=0, description="factor of the learning rate in the second phase")
    exclude: tuple[str, ...] = Field((), description="modules to leave frozen: roles, names or patterns")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the gates")

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Half of the gates are open, so that the cut takes them all; the search ends in a run of a few steps."""
        return {"density": 0.6, "start": 0.0, "search": 0.6, "sparsity": 1e-5}

    def turns(self) -> int:
        """In three times as many steps the gate of a tensor is open once, but for a chance of one in a thousand."""
        closed = 1 / (1 + math.exp(self.start - math.log(-self.low / self.high)))
        return max(1, math.ceil(math.log(1e-3) / math.log(closed) / 3)) if closed > 0 else 1

    # ------------------------------------------------------------------ attaching

    def attach(self, host: Carrier, name: str) -> None:
        """Put gates on every module that holds a parameter; a tied parameter has those of its first module."""
        eligible = self.eligible(host)
        self.budget(eligible)
        wanted = {id(p) for p in eligible.values()}
        owners: dict[int, Gated] = {}
        for site in host.all_sites():
            held = {leaf: p for leaf, p in site.module._parameters.items() if p is not None and id(p) in wanted}
            if held:
                layer = Gated(self, site, {leaf: owners.get(id(p)) for leaf, p in held.items()})
                owners |= {id(held[leaf]): layer for leaf in layer.diff}
                host.wrap(name, site, layer)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Train the entries that were kept, or go on searching if the adapter was saved before."""
        kept = chosen.saved_entries(tensors)
        if not kept:
            self.attach(host, name)
        chosen.own_entries(host, name, kept)

    def eligible(self, host: Carrier) -> dict[str, nn.Parameter]:
        """Return the parameters that are changed."""
        return chosen.eligible(host, self.id, (*self.exclude, *self.modules_to_save))

    def budget(self, parameters: Mapping[str, nn.Parameter]) -> int:
        """Return how many entries are kept.

        Raises:
            AttachError: none.
        """
        total = sum(p.numel() for p in parameters.values())
        k = int(self.density * total)
        if not k:
            raise AttachError(
                f"{self.id}: density={self.density} of {total:,} entries keeps none. Raise density, or exclude less."
            )
        return k

    def layers(self, host: Carrier, name: str) -> dict[str, Gated]:
        """Return the adapter's parts by path; there are none any more when it has its entries."""
        return {path: a for path, a in host.adapters(name).items() if isinstance(a, Gated)}

    # ------------------------------------------------------------------ the run

    def first(self, steps: int) -> int:
        """Steps of the first phase of a run."""
        return max(1, steps_of(self.search, steps))

    def begin(self, host: Carrier, name: str, steps: int) -> None:
        """Fit the phases into the run.

        Raises:
            ConfigError: it has fewer steps than the first one alone.
        """
        layers = self.layers(host, name).values()
        if layers and self.first(steps) > steps:
            raise ConfigError(
                f"{self.id}: search={self.search} steps do not fit into this run's {steps}. Choose at most {steps}, "
                "give a share of the run such as 0.5, or train longer."
            )
        for layer in layers:
            layer.steps = steps

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """One group for the changes, and one for the gates, also when some are frozen already."""
        layers = self.layers(host, name).values()
        if not layers:
            return make(host.parameters(name))
        gates, diffs = ([p for layer in layers for p in held(layer)] for held in (Gated.gates, Gated.diffs))
        known = {id(p) for p in (*gates, *diffs)}
        rest = [p for p in host.parameters(name) if id(p) not in known]
        groups: list[dict[str, Any]] = [
            {"params": [*diffs, *rest]},
            {"params": gates, "lr": self.gate_lr, "weight_decay": 0.0},
        ]
        return make(groups)

    def rate(self, step: int, steps: int, plain: Callable[[float], float]) -> float:
        """The trainer's schedule once for each phase."""
        first = self.first(steps)
        if step < first:
            return plain(step * steps / first)
        return self.second_rate * plain((step - first) * steps / max(1, steps - first))

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Draw new gates, or cut when it is time.

        Raises:
            NotTrainingError: it is not known how long the run is, or the optimizer gives gates no rate of their own.
        """
        layers = self.layers(host, name)
        if not layers:
            return
        steps = next(iter(layers.values())).steps
        if steps is None:
            raise NotTrainingError(
                f"The {self.id} adapter {name!r} does not know how many steps the run has. Call "
                f"host.methods[{name!r}].begin(host, {name!r}, steps) before the first one; adapterlab's loop and "
                "AdapterlabCallback do it by themselves."
            )
        for layer in layers.values():
            layer.step = step
        if not self.is_cut(layers) and step >= self.first(steps):
            self.cut(layers)
            optimizer.state.clear()  # what it knows is of another problem
        if not self.is_cut(layers):
            self._set_gate_rate(name, layers, optimizer)

    def _set_gate_rate(self, name: str, layers: Mapping[str, Gated], optimizer: Optimizer) -> None:
        gates = {id(p) for layer in layers.values() for p in layer.gates()}
        known = 0
        for group in optimizer.param_groups:
            inside = [id(p) in gates for p in group["params"]]
            if inside and all(inside):
                group["lr"] = self.gate_lr
                known += len(inside)
        if known < len(gates):
            raise NotTrainingError(
                f"{self.id}: the gates need a rate of their own, and this optimizer has no group for them. Build it "
                f"with host.methods[{name!r}].optimizer(host, {name!r}, make) and give it to the trainer."
            )

    def penalty(self, host: Carrier, name: str) -> Tensor | None:
        """λ times the expected number of open gates, while they can close."""
        layers = self.layers(host, name)
        if not self.sparsity or not layers or self.is_cut(layers):
            return None
        counts = [layer.expected(leaf) for layer in layers.values() for leaf in layer.diff]
        return self.sparsity * torch.stack([count.to(counts[0].device) for count in counts]).sum()

    def is_cut(self, layers: Mapping[str, Gated]) -> bool:
        """Say whether the entries are chosen; a state that was loaded since may say otherwise than before."""
        found = next(iter(layers.values()))
        if bool(found.is_cut) != found.fixed:
            for layer in layers.values():
                layer.freeze(not layer.fixed)
        return found.fixed

    @torch.no_grad()
    def cut(self, layers: Mapping[str, Gated]) -> None:
        """Keep the largest entries of δ, with the gates as they are drawn now, and let the others be the base's."""
        places = {f"{path}.{leaf}": (layer, leaf) for path, layer in layers.items() for leaf in layer.diff}
        kept = chosen.top(list(places), lambda path: self.size(*places[path]), self._count(places))
        for path, (layer, leaf) in places.items():
            layer.keep(leaf, kept.get(path))
        for layer in layers.values():
            layer.is_cut.fill_(True)
            layer.freeze()

    def size(self, layer: Gated, leaf: str) -> Tensor:
        """|δ| of the entries of one parameter."""
        return layer.change(leaf, drawn=True).abs().flatten()

    def _count(self, places: Mapping[str, tuple[Gated, str]]) -> int:
        return int(self.density * sum(layer.diff[leaf].numel() for layer, leaf in places.values()))

    @torch.no_grad()
    def finish(self, host: Carrier, name: str) -> None:
        """Write the entries that are kept into the base, as values with their positions."""
        layers = self.layers(host, name)
        if not layers:
            return
        if not self.is_cut(layers):
            self.cut(layers)
        tuned = {path: layer.entries() for path, layer in layers.items()}
        for layer in layers.values():
            host.unwrap(name, layer.site)
        for path, held in tuned.items():
            for leaf, (index, values) in held.items():
                full = f"{path}.{leaf}" if path else leaf
                if len(index):
                    host.own(name, full, index=index).copy_(values)
                    write(host.model.get_parameter(full), index, values)

    def outcome(self, host: Carrier, name: str) -> dict[str, str]:
        """How many entries are left, and where."""
        kept = [patch.index for patch in host.patches[name].values() if patch.index is not None]
        count, total = sum(map(len, kept)), sum(p.numel() for p in self.eligible(host).values())
        return {"entries": f"{count:,} of {total:,} ({count / total:.2%}) in {len(kept)} tensors"}


class Gated(Substitute):
    """The changes of one module's parameters, and their gates.

    Attributes:
        diff: w of each parameter, in its shape.
        gate: α of each entry of it.
        group: α of the whole, `[1]`.
        is_cut: what is kept was chosen: gates are 0 or 1 for good.
        fixed: the same, as it was when it was last looked at.
        step: of the run, by which gates are drawn.
        steps: of the run, once they are known.
        elsewhere: for a tied parameter, the part at the module that comes first.
    """

    tokenwise: ClassVar[bool | None] = True
    is_cut: Tensor

    def __init__(self, method: DiffPruning, site: Site, elsewhere: Mapping[str, Gated | None]):
        super().__init__(site)
        self.names = tuple(elsewhere)
        self.low, self.high, self.seed = method.low, method.high, method.seed
        self.multiplies = method.penalty_form == "product"
        self.elsewhere = {leaf: other for leaf, other in elsewhere.items() if other is not None}
        shapes = {leaf: site.module._parameters[leaf].shape for leaf in self.names if leaf not in self.elsewhere}  # type: ignore[union-attr]
        self.diff = nn.ParameterDict({leaf: site.parameter(*shape) for leaf, shape in shapes.items()})
        self.gate = nn.ParameterDict({leaf: site.parameter(*shape) for leaf, shape in shapes.items()})
        grouped = shapes if method.structured else ()
        self.group = nn.ParameterDict({leaf: site.parameter(1) for leaf in grouped})
        for alpha in self.gates():
            nn.init.constant_(alpha, method.start)
        self.register_buffer("is_cut", torch.zeros((), dtype=torch.bool, device=site.device))
        self.fixed, self.step = False, 0
        self.steps: int | None = None

    def gates(self) -> list[nn.Parameter]:
        """All α."""
        return [*self.gate.values(), *self.group.values()]

    def diffs(self) -> list[nn.Parameter]:
        """All w."""
        return list(self.diff.values())

    def values(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """θ₀ + δ, added in the precision of w and rounded once."""
        found = {}
        for leaf, stored in parameters.items():
            change = self.elsewhere.get(leaf, self).change(leaf, drawn=self.training)
            precise = torch.promote_types(stored.dtype, change.dtype)
            found[leaf] = (stored.to(precise) + change).to(stored.dtype)
        return found

    def change(self, leaf: str, *, drawn: bool) -> Tensor:
        """δ of one parameter; with gates that are drawn, or as they are outside of training."""
        draw = self.generator(leaf) if drawn and not self.fixed else None
        found = self.opened(self.gate[leaf], draw) * self.diff[leaf]
        return found * self.opened(self.group[leaf], draw) if leaf in self.group else found

    def generator(self, leaf: str) -> torch.Generator:
        """What draws the gates of one parameter in this step."""
        origin = (self.seed, zlib.crc32(f"{self.site.path}.{leaf}".encode()), self.step)
        seed = int(np.random.SeedSequence(origin).generate_state(1)[0])
        return torch.Generator(self.diff[leaf].device).manual_seed(seed)

    def opened(self, alpha: Tensor, draw: torch.Generator | None) -> Tensor:
        """Gates z between 0 and 1, in the shape of α."""
        if draw is not None:
            u = torch.rand(alpha.shape, generator=draw, device=alpha.device, dtype=alpha.dtype)
            alpha = alpha + u.clamp_(_LEAST, 1 - _LEAST).logit()
        return self.stretched(alpha.sigmoid()).clamp(0, 1)

    def stretched(self, s: Tensor) -> Tensor:
        """From (0, 1) to (l, r), so that both ends are met with a chance above 0."""
        return s * (self.high - self.low) + self.low

    def probability(self, alpha: Tensor) -> Tensor:
        """That a gate is not 0."""
        return (alpha - math.log(-self.low / self.high)).sigmoid()

    def expected(self, leaf: str) -> Tensor:
        """The expected number of open gates of one parameter."""
        single = self.probability(self.gate[leaf]).sum()
        if leaf not in self.group:
            return single
        whole = self.probability(self.group[leaf]).sum()
        return single * whole if self.multiplies else single + whole

    def keep(self, leaf: str, index: Tensor | None) -> None:
        """Let these entries of a parameter be δ as it is now, and the others 0 for good."""
        change, open_ = self.change(leaf, drawn=True).flatten(), torch.zeros_like(self.diff[leaf]).flatten()
        if index is not None:
            open_[index] = 1
        self.diff[leaf].copy_((change * open_).view_as(self.diff[leaf]))
        self.gate[leaf].copy_(((2 * open_ - 1) * _CERTAIN).view_as(self.gate[leaf]))
        if leaf in self.group:
            self.group[leaf].fill_(_CERTAIN)

    def freeze(self, fixed: bool = True) -> None:
        """Train no gates any more, and no parameter of which nothing is kept; or again."""
        self.fixed = fixed
        for alpha in self.gates():
            alpha.requires_grad_(not fixed)
            alpha.grad = None
        for leaf, diff in self.diff.items():
            diff.requires_grad_(not fixed or bool((self.gate[leaf] > 0).any()))
            diff.grad = None

    def entries(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Positions of what is kept of each parameter, and the values of θ there."""
        found = {}
        for leaf, diff in self.diff.items():
            index = (self.gate[leaf].flatten() > 0).nonzero().flatten()
            stored = self.site.module._parameters[leaf]
            assert stored is not None
            found[leaf] = index, read(stored, index).to(diff.dtype) + diff.detach().flatten()[index]
        return found
