"""Looking at a model: its backbone, layers, attention modules, and every module as a site."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from adapterlab.core.site import Site
from adapterlab.core.targets import Targets, select
from adapterlab.engine.attention import bridge, is_reached
from adapterlab.errors import AttachError, TargetError, nearest
from adapterlab.foreign.model import (
    backbone_of,
    base_modules,
    fresh_heads,
    is_adapter_path,
    main_stacks,
    output_head,
    place_in_stack,
    plain_class,
    plain_path,
    stacks,
    unwrapped,
    weight_reads,
)
from adapterlab.foreign.roles import role_of


class Anatomy:
    """A model, seen without the adapters it may carry."""

    def __init__(self, model: nn.Module):
        self.model: Any = unwrapped(model)  # of transformers, it has methods that nn.Module does not declare

    @functools.cached_property
    def backbone(self) -> nn.Module:
        """The model without its output or task head."""
        found: nn.Module = backbone_of(self.model)
        return found

    @property
    def attentions(self) -> list[nn.Module]:
        """The attention modules that `attend` can reach, in order.

        Raises:
            AttachError: there are none.
        """
        found = [module for _, module in base_modules(self.model) if is_reached(plain_class(module))]
        if not found:
            bridge(next((m for m in self.model.modules() if "attention" in type(m).__name__.lower()), self.model))
        return found

    @property
    def layers(self) -> list[nn.Module]:
        """The repeated blocks that text, or whatever the model reads, goes through; encoder first, then decoder.

        Raises:
            AttachError: the model has no list of layers.
        """
        found = main_stacks(self.model)
        if not found:
            raise AttachError(
                f"{type(self.model).__name__} has no list of layers; name the modules by pattern instead."
            )
        return [block for stack in found for block in stack]

    @functools.cached_property
    def stacks(self) -> dict[str, nn.ModuleList]:
        """Every stack of layers of the model by path, towers beside the language model included."""
        return stacks(self.model)

    @functools.cached_property
    def new(self) -> tuple[str, ...]:
        """Modules that no checkpoint filled, and that lead to a task head or are one."""
        return tuple(fresh_heads(self.model))

    @functools.cached_property
    def _weight_reads(self) -> dict[str, tuple[str, bool]]:
        """Modules whose weights others read; neither adapters nor merging change that."""
        return weight_reads(dict(base_modules(self.model)))

    def layer_of(self, path: str) -> tuple[str | None, int | None]:
        """Return the stack that a module or parameter belongs to, and its layer's index there, or (None, None)."""
        return place_in_stack(path, self.stacks)

    def module(self, path: str) -> nn.Module:
        """Return the module of a path.

        Raises:
            AttributeError: there is none.
        """
        found: nn.Module = unwrapped(self.model.get_submodule(path))
        return found

    def path_of(self, module: nn.Module) -> str:
        """Return the dotted name of a module of the model.

        Raises:
            AttachError: it is not part of the model.
        """
        inside = unwrapped(module)
        for path, found in self.model.named_modules():
            if found is inside:
                return plain_path(path)
        raise AttachError(f"This {type(module).__name__} is not part of the {type(self.model).__name__} of this host.")

    def all_sites(self) -> list[Site]:
        """Return every base module as a site, adapters and shared tensors left out."""
        backbone = {id(m) for m in self.backbone.modules()} if self.backbone is not self.model else None
        output = output_head(self.model)
        modules = dict(base_modules(self.model))
        shared = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
        sites = []
        for path, module in modules.items():
            is_head = module is output or (backbone is not None and id(module) not in backbone) or path in self.new
            weight = module._parameters.get("weight")
            tied = weight is not None and shared[id(weight)] > 1
            role = "head" if module is output else role_of(path)
            stack, layer = self.layer_of(path)
            by, overtaken = self._weight_reads.get(path, ("", False))
            sites.append(Site(path, module, layer, role, is_head, tied, stack, "" if overtaken else by, overtaken))
        return sites

    def site(self, module: nn.Module) -> Site:
        """Return the site of one module."""
        path = self.path_of(module)
        return next(s for s in self.all_sites() if s.path == path)

    def sites(self, targets: Targets, kinds: Sequence[str] | None = None) -> list[Site]:
        """Return the sites that targets mean, in model order; see `Targets`.

        Raises:
            TargetError: an entry matches nothing, or only kinds that the method cannot adapt.
        """
        return select(targets, self.all_sites(), kinds, type(self.model).__name__)

    def holding(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return the modules that hold the parameters that names mean, and what these call them, in their order.

        Args:
            names: paths of parameters, or the last parts of them such as `mlp.experts.down_proj`.

        Raises:
            TargetError: one of them matches nothing.
        """
        every = {
            (path, leaf): f"{path}.{leaf}"
            for path, m in base_modules(self.model)
            for leaf, p in m._parameters.items()
            if p is not None
        }
        for name in names:
            if not any(ends_in(full, name) for full in every.values()):
                short = {re.sub(r"^.*\.\d+\.", "", full) for full in every.values()}
                bare = {found for found in short if found.rpartition(".")[2] not in ("weight", "bias")}
                raise TargetError(
                    f"parameters: {name!r} matches no parameter of {type(self.model).__name__}. "
                    f"{nearest(name, bare or short)} Modules with a weight of their own go into targets."
                )
        found: dict[str, tuple[str, ...]] = {}
        for (path, leaf), full in every.items():
            if any(ends_in(full, name) for name in names):
                found[path] = (*found.get(path, ()), leaf)
        return found

    def base_parameters(self, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
        """Return the base's own parameters by name, a tied one once, adapters' left out.

        Args:
            exclude: modules whose parameters are left out: roles, names or patterns, as in `Targets.include`.
        """
        excluded = self.sites(Targets(include=tuple(exclude))) if exclude else []
        left_out = {id(p) for site in excluded for p in site.module.parameters()}
        named = [(plain_path(path), p) for path, p in self.model.named_parameters()]
        return {path: p for path, p in named if id(p) not in left_out and not self.is_adapter_path(path)}

    @staticmethod
    def is_adapter_path(path: str) -> bool:
        """Say whether a parameter's name belongs to an adapter and not to the base."""
        return is_adapter_path(path)


def ends_in(path: str, name: str) -> bool:
    """Say whether a path ends in a name, at a dot."""
    return path == name or path.endswith("." + name)
