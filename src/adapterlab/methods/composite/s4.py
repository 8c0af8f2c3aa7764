"""Other methods in other layers: groups of layers, each with its own set, and the same budget for every layer."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.hub import method_of
from adapterlab.core.method import Batches, Composite, Method
from adapterlab.core.site import Site
from adapterlab.core.targets import Targets
from adapterlab.engine.modes import evaluating
from adapterlab.errors import AttachError, DataError, NotTrainingError, TrainingError
from adapterlab.hosts import attach
from adapterlab.methods.bottleneck._bottleneck import feed_forwards, width_of
from adapterlab.methods.bottleneck.adapter_pfeiffer import AdapterPfeiffer
from adapterlab.methods.in_place.bitfit import BitFit
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.prompt.prefix_tuning import PrefixTuning, kv_shape
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer

Kind = Literal["adapter", "prefix", "bitfit", "lora"]
Groups = tuple[tuple[Kind, ...], ...]
FOUND: Groups = (
    ("adapter", "lora"),
    ("adapter", "prefix"),
    ("adapter", "prefix", "bitfit"),
    ("prefix", "bitfit", "lora"),
)
LONGEST = 64  # a longer prefix costs attention more than it gives


@register
class S4(Composite):
    """Group the layers, few at both ends and many in the middle, and give every group the methods that suit it.

    Groups from the input on: {adapter, LoRA}, {adapter, prefix}, {adapter, prefix, BitFit}, {prefix, BitFit, LoRA}, as
    found for T5-base. With G groups of L layers the first and the last have max(1, round(L / (2 G − 2))), those between
    share the rest evenly: 2, 4, 4 and 2 of twelve ("spindle"; the numbers are a choice made here). Stacks of an
    encoder-decoder are grouped by themselves. Where there are fewer layers than groups, layer i has the methods of
    group ⌊i G / L⌋.

    Budget: ρ N numbers for N of the base, the same for each of all layers. In a layer BitFit takes its biases; the rest
    is divided evenly among the other methods, which are made as large as fits: bottleneck m, prefix length l (64 at
    most) and rank r, each 1 at least.

    Where it attaches: adapters as `adapter_pfeiffer`, prefixes in every attention module, LoRA with alpha = 2 r on
    queries and values or the fused module that holds them, BitFit on all biases of a layer, or on new ones of its
    linear layers where it has none.

    Start: of each part as it starts by itself.

    Trainable parameters: at most ρ N, unless biases and the smallest sizes are more.

    Inference: not mergeable as a whole, since adapters and prefixes are not.

    `groups` says other sets, and one group alone is one method (or several) everywhere with the same budget. With
    `search = n` the sets are looked for when training begins, as the authors did for T5: group by group from the input
    on, each of `candidates` is tried for n steps on the first batches, from the same start and beside what the other
    groups have by then, and the one with the least loss on batches behind them is kept. That is 15 trials for a group
    with all sets of the four methods; the rows tried on are rows that are trained on afterwards.

    Rate: 5e-4, LoRA's; the authors' command for RoBERTa takes 5e-5.

    Reference: "Parameter-Efficient Fine-Tuning Design Spaces", arXiv 2301.01821.

    Example:
        >>> from adapterlab.methods.composite.s4 import spindle
        >>> spindle(12, 4), spindle(24, 4), spindle(6, 1)
        ([2, 4, 4, 2], [4, 8, 8, 4], [6])
    """

    formula: ClassVar[str] = "at most ρ N"
    starts_at_base: ClassVar[bool] = False

    density: float = Field(0.005, gt=0, lt=1, description="share ρ of the base's numbers that may train")
    groups: Groups = Field(FOUND, description="methods of each group of layers: adapter, prefix, bitfit, lora")
    sizes: tuple[int, ...] | None = Field(None, description="number of layers of each group; default: the spindle")
    init: Literal["words", "normal", "zeros"] = Field("words", description="start of the prefixes, as in prefix_tuning")
    search: int = Field(0, ge=0, description="steps to try each set of methods for, before training; 0: take `groups`")
    candidates: Groups = Field((), description="sets of methods that are tried; default: every one")
    search_lr: float = Field(1e-3, gt=0, description="learning rate of the trials")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.groups or not all((*self.groups, *self.candidates)):
            raise ValueError("groups needs one set of methods at least, and none of them empty")
        if any(len(set(kinds)) < len(kinds) for kinds in (*self.groups, *self.candidates)):
            raise ValueError(f"groups={self.groups} or candidates={self.candidates} name a method twice in a group")
        if self.candidates and not self.search:
            raise ValueError("candidates are tried by a search: set search to the steps of a trial, such as 20")
        if self.sizes is not None and (len(self.sizes) != len(self.groups) or min(self.sizes) < 1):
            raise ValueError(f"sizes={self.sizes} should give each of {len(self.groups)} groups one layer at least")
        return self

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Leave room for something in a tiny model."""
        return {"density": 0.1}

    def attach(self, host: Carrier, name: str) -> None:
        """Attach the methods of each group; with a search, when that has found them."""
        if not self.search:
            super().attach(host, name)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Likewise; what is saved after a search has found its groups."""
        if not self.search:
            super().attach_saved(host, name, tensors)

    def prepare(self, host: Carrier, name: str, batches: Batches) -> None:
        """Search, if that is asked for; what has been found stays as it is."""
        if self._waits(host, name):
            looked = itertools.islice(batches, self.search + math.ceil(self.search / 3))  # a quarter judges
            found = self.replace(groups=searched(self, host, list(looked)), search=0, candidates=())
            host.settle(name, found)
            found.attach(host, name)
            host.activate(*host.active)  # the parts are new
        super().prepare(host, name, batches)

    def brief(self) -> Self:
        """Take the groups as they are: a search ends with as large a budget."""
        return self.replace(search=0, candidates=())

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Refuse to train in a loop that did not call `prepare`."""
        super().before_step(host, name, step, optimizer)
        if self._waits(host, name):
            raise NotTrainingError(
                f"The {self.id} adapter {name!r} has not searched yet. Call host.methods[{name!r}].prepare(host, "
                f"{name!r}, batches) with labelled batches before the optimizer is made; the training loop of "
                "adapterlab does it by itself."
            )

    def outcome(self, host: Carrier, name: str) -> dict[str, str]:
        """What a search has found."""
        sets = method_of(host, name).groups if self.search else ()
        found = {"groups": "; ".join(" + ".join(kinds) for kinds in sets)} if sets else {}
        return {**super().outcome(host, name), **found}

    def _waits(self, host: Carrier, name: str) -> bool:
        """Say whether a search is still to come."""
        parts = host.part_methods(name.partition("/")[0])
        return self.search > 0 and not any(key.startswith(f"{name}/") for key in parts)

    def parts(self, host: Carrier) -> dict[str, Method]:
        """One method for all layers in which it has the same size and group."""
        layers = layers_of(host)
        total = sum(p.numel() for p in host.base_parameters(self.modules_to_save).values())
        budget = self.density * total / sum(map(len, layers.values()))
        members: dict[tuple[int, Kind, int], list[Layer]] = defaultdict(list)
        for stack in layers.values():
            for layer, group in zip(stack, self.group_of(len(stack)), strict=True):
                for kind, size in layer.sizes(self.groups[group], budget).items():
                    members[group, kind, size].append(layer)
        return {
            f"group{group + 1}-{kind}-{size}": self.part(kind, size, found)
            for (group, kind, size), found in sorted(members.items())
        }

    def group_of(self, count: int) -> list[int]:
        """Return the group of each of so many layers.

        Raises:
            AttachError: the sizes that were given are of another number of layers.
        """
        groups = len(self.groups)
        if self.sizes is not None and sum(self.sizes) != count:
            raise AttachError(
                f"{self.id}: sizes={self.sizes} make {sum(self.sizes)} layers, and a stack of this model has {count}. "
                "Give sizes that add up to it, or leave them out."
            )
        if count < groups:
            return [i * groups // count for i in range(count)]
        return [group for group, size in enumerate(self.sizes or spindle(count, groups)) for _ in range(size)]

    def part(self, kind: Kind, size: int, layers: Sequence[Layer]) -> Method:
        """Return one method at the places of some layers."""
        targets = Targets(include=tuple(path for layer in layers for path in layer.places(kind)))
        if kind == "adapter":
            return AdapterPfeiffer(m=size, targets=targets)
        if kind == "prefix":
            return PrefixTuning(length=size, offset=0, init=self.init, targets=targets)
        if kind == "lora":
            return LoRA(r=size, alpha=2 * size, targets=targets)
        return BitFit(targets=targets, bias_mode="existing" if layers[0].biases else "add")


def searched(method: S4, host: Carrier, batches: Sequence[Mapping[str, Tensor]]) -> Groups:
    """Return the best set of methods for each group, found one after the other.

    Raises:
        DataError: there are too few batches, or they have no labels.
        TrainingError: no trial had a finite loss.
    """
    judged = max(1, len(batches) // 4)
    tried, behind = batches[: min(method.search, len(batches) - judged)], batches[len(batches) - judged :]
    if not tried or any("labels" not in batch for batch in batches):
        raise DataError(f"{method.id}: a search needs two batches with labels at least; received {len(batches)}.")
    stacks = layers_of(host).values()
    used = sorted({group for stack in stacks for group in method.group_of(len(stack))})
    groups = list(method.groups)
    for group in used:
        losses = {}
        for kinds in method.candidates or every_set(layer for stack in stacks for layer in stack):
            groups[group] = kinds
            tuned = method.replace(groups=tuple(groups), search=0, candidates=())
            losses[kinds] = loss_with(tuned, host, tried, behind, method.search)
        groups[group] = min(losses, key=lambda kinds: losses[kinds])
        if not math.isfinite(losses[groups[group]]):
            raise TrainingError(
                f"{method.id}: no set of methods for group {group + 1} has a finite loss after {method.search} steps. "
                f"Lower search_lr, which is {method.search_lr}."
            )
    return tuple(groups)


def loss_with(
    method: S4,
    host: Carrier,
    batches: Sequence[Mapping[str, Tensor]],
    judged: Sequence[Mapping[str, Tensor]],
    steps: int,
) -> float:
    """Attach a method, train it on batches, and return its mean loss on others; the model is left as it was."""
    key = "s4-trial"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attach(host.model, method, key)
        try:
            parameters = host.parameters(key)
            optimizer = torch.optim.AdamW(parameters, lr=method.search_lr, weight_decay=0.0)
            for batch in itertools.islice(itertools.cycle(batches), steps):
                gradients = torch.autograd.grad(host.model(**batch).loss, parameters, allow_unused=True)
                for p, gradient in zip(parameters, gradients, strict=True):
                    p.grad = gradient
                optimizer.step()
            with evaluating(host.model):
                losses = [float(host.model(**batch).loss) for batch in judged]
        finally:
            host.detach(key)
    return sum(losses) / len(losses) if all(math.isfinite(loss) for loss in losses) else math.inf


def every_set(layers: Iterable[Layer]) -> list[tuple[Kind, ...]]:
    """All sets of the methods that have a place in each of the layers."""
    held = list(layers)
    kinds = [kind for kind in get_args(Kind) if all(layer.has(kind) for layer in held)]
    return [chosen for count in range(1, len(kinds) + 1) for chosen in itertools.combinations(kinds, count)]


class Layer:
    """One layer of a model, and what the methods find in it.

    Attributes:
        feed_forwards: with the width of what they return.
        attentions: with the numbers of a key-value pair.
        linears: all linear layers; `projections` are the queries and values among them.
        biases: modules with a bias, with its length.
    """

    def __init__(self, path: str, sites: Sequence[Site], attentions: Mapping[str, Site], inner: Sequence[Site]):
        held = [site for site in sites if f"{site.path}.".startswith(f"{path}.")]
        self.path = path
        self.feed_forwards = {site.path: width_of(site, sites) for site in inner if site in held}
        self.attentions = {p: _pair(s) for p, s in attentions.items() if p.startswith(f"{path}.")}
        self.linears = {s.path: s.shape for s in held if s.kind == "linear" and not s.bypassed}
        roles = {s.path: s.role for s in held}
        chosen = ("q", "v") if "q" in roles.values() else ("qkv",)
        self.projections = {p: shape for p, shape in self.linears.items() if roles[p] in chosen}
        self.biases = {s.path: count for s in held if (count := _bias_numbers(s.module))}

    def places(self, kind: Kind) -> list[str]:
        """Paths of the modules that a method adapts here.

        Raises:
            AttachError: there are none.
        """
        if not self.has(kind):
            raise AttachError(
                f"s4: {self.path} has no place for {kind}. Choose groups without it, for example "
                "groups=[[adapter, lora]]."
            )
        return list(self._held(kind))

    def has(self, kind: Kind) -> bool:
        """Say whether a method has a place here."""
        return bool(self._held(kind))

    def _held(self, kind: Kind) -> Mapping[str, Any]:
        every: dict[Kind, Mapping[str, Any]] = {
            "adapter": self.feed_forwards,
            "prefix": self.attentions,
            "lora": self.projections,
            "bitfit": self.biases or self.linears,
        }
        return every[kind]

    def sizes(self, kinds: Sequence[Kind], budget: float) -> dict[Kind, int]:
        """Return how large each method may be: m, l, r, and for BitFit how many numbers it has."""
        for kind in kinds:
            self.places(kind)
        found: dict[Kind, int] = {}
        if "bitfit" in kinds:
            found["bitfit"] = sum(self.biases.values()) or sum(out for out, _ in self.linears.values())
        others = [kind for kind in kinds if kind != "bitfit"]
        share = (budget - found.get("bitfit", 0)) / max(1, len(others))
        widths = self.feed_forwards.values()
        fits: dict[Kind, Callable[[], float]] = {
            "adapter": lambda: (share - sum(widths)) // sum(2 * d + 1 for d in widths),
            "prefix": lambda: min(LONGEST, share // sum(self.attentions.values())),
            "lora": lambda: min(
                share // sum(out + in_ for out, in_ in self.projections.values()),
                min(min(shape) for shape in self.projections.values()),
            ),
        }
        return {**found, **{kind: max(1, int(fits[kind]())) for kind in others}}


def layers_of(host: Carrier) -> dict[str, list[Layer]]:
    """Return the layers of each stack.

    Raises:
        AttachError: there are none.
    """
    sites = host.all_sites()
    attentions = {site.path: site for site in PrefixTuning().modules(host)}
    inner = feed_forwards(sites)
    found: dict[str, list[Layer]] = defaultdict(list)
    for block in host.layers:
        path = host.path_of(block)
        found[path.rpartition(".")[0]].append(Layer(path, sites, attentions, inner))
    return found


def spindle(layers: int, groups: int) -> list[int]:
    """Share layers out: few at both ends, many in the middle."""
    if groups < 3:
        return [layers // groups + (i < layers % groups) for i in range(groups)]
    outer = max(1, round(layers / (2 * groups - 2)))
    rest, between = layers - 2 * outer, groups - 2
    return [outer, *(rest // between + (i < rest % between) for i in range(between)), outer]


def _pair(site: Site) -> int:
    heads, width = kv_shape(site.module)
    return 2 * heads * width


def _bias_numbers(module: nn.Module) -> int:
    named = module._parameters.items()
    return sum(p.numel() for key, p in named if p is not None and (key == "bias" or key.endswith("_bias")))
