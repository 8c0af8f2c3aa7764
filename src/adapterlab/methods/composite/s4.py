"""Other methods in other layers: groups of layers, each with its own set, and the same budget for every layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Composite, Method
from adapterlab.core.site import Site
from adapterlab.core.targets import Targets
from adapterlab.errors import AttachError
from adapterlab.methods.bottleneck._bottleneck import feed_forwards, width_of
from adapterlab.methods.bottleneck.adapter_pfeiffer import AdapterPfeiffer
from adapterlab.methods.in_place.bitfit import BitFit
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.prompt.prefix_tuning import PrefixTuning, kv_shape
from adapterlab.registry import register

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

    `groups` says other sets, and one group alone is one method (or several) everywhere with the same budget.

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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.groups or not all(self.groups):
            raise ValueError("groups needs one set of methods at least, and none of them empty")
        if any(len(set(kinds)) < len(kinds) for kinds in self.groups):
            raise ValueError(f"groups={self.groups} names a method twice in a group")
        if self.sizes is not None and (len(self.sizes) != len(self.groups) or min(self.sizes) < 1):
            raise ValueError(f"sizes={self.sizes} should give each of {len(self.groups)} groups one layer at least")
        return self

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Leave room for something in a tiny model."""
        return {"density": 0.1}

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
        every: dict[Kind, Mapping[str, Any]] = {
            "adapter": self.feed_forwards,
            "prefix": self.attentions,
            "lora": self.projections,
            "bitfit": self.biases or self.linears,
        }
        if not every[kind]:
            raise AttachError(
                f"s4: {self.path} has no place for {kind}. Choose groups without it, for example "
                "groups=[[adapter, lora]]."
            )
        return list(every[kind])

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
