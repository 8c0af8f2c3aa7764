"""Low-rank updates of bare parameters, such as the stacked weights of experts that one module holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.site import Site
from adapterlab.engine.anatomy import ends_in
from adapterlab.engine.substitute import Substitute
from adapterlab.errors import AttachError
from adapterlab.foreign.quantized import is_plain
from adapterlab.methods.low_rank._starts import Place

NONE = ("none",)  # as targets: nothing but the bare parameters is adapted


def check(method: Any, plain: bool) -> None:
    """Refuse options that have no meaning for an update of a parameter.

    Args:
        method: with its fields.
        plain: its adapters are LoRA's own.

    Raises:
        ValueError: one of them is set.
    """
    if not method.parameters:
        if method.targets.include == NONE:
            raise ValueError("targets='none' leaves nothing to adapt: name bare parameters in `parameters`, or modules")
        return
    named = f"parameters={list(method.parameters)}"
    if not plain:
        raise ValueError(f"{named}: {method.id} adapts modules only; use lora for bare parameters")
    if method.dropout:
        raise ValueError(
            f"{named} with dropout={method.dropout}: an update of the weight itself has no input to drop from; set "
            "dropout=0"
        )
    if method.lora_bias:
        raise ValueError(f"{named} with lora_bias=True: a bare parameter has no bias; set lora_bias=False")
    if method.init.moves_base or method.init.needs_data:
        raise ValueError(f"{named} with init={method.init.name!r}: they start with 'kaiming' or 'gaussian' only")


def attach(method: Any, host: Carrier, name: str) -> list[str]:
    """Wrap the modules that hold the method's bare parameters, and return the paths of these."""
    if not method.parameters:
        return []
    held = host.holding(method.parameters)
    for site in [site for site in host.all_sites() if site.path in held]:
        host.wrap(name, site, ExpertFactors(method, site, held[site.path]))
    return [f"{path}.{leaf}" for path, leaves in held.items() for leaf in leaves]


def adapted(method: Any, site: Site) -> tuple[str, ...]:
    """The bare parameters of one module that the method adapts."""
    every = ((leaf, f"{site.path}.{leaf}") for leaf, p in site.module._parameters.items() if p is not None)
    return tuple(leaf for leaf, path in every if any(ends_in(path, name) for name in method.parameters))


class Pair(nn.Module):
    """The factors of one parameter: A `[E, r, in]` and B `[E, out, r]` for E experts, 1 if it is a plain matrix."""

    def __init__(self, method: Any, site: Site, leaf: str):
        super().__init__()
        stored = site.module._parameters[leaf]
        path = f"{site.path}.{leaf}"
        assert stored is not None
        packed = not is_plain(stored) or not stored.is_floating_point()
        if packed or stored.dim() not in (2, 3):
            raise AttachError(
                f"parameters: {path} is {tuple(stored.shape)} {stored.dtype}; bare parameters are matrices "
                "`[out, in]` or stacks of them `[experts, out, in]` in plain numbers. Name another, or load the model "
                "without quantization."
            )
        # Some models store the experts' weights `[E, in, out]` and say so.
        self.transposed = stored.dim() == 3 and bool(getattr(site.module, "is_transposed", False))
        experts = len(stored) if stored.dim() == 3 else 1
        out, in_ = stored.shape[:-3:-1] if self.transposed else stored.shape[-2:]
        r, self.scale = method.rank(path), method.scaling(path)
        self.A, self.B = site.parameter(experts, r, in_), site.parameter(experts, out, r)
        one = nn.utils.skip_init(nn.Linear, in_, out, bias=False, device=site.device, dtype=site.dtype)
        with torch.no_grad():
            for a, b in zip(self.A, self.B, strict=True):
                start = method.init.start(Place(Site(path, one), r, self.scale))
                a.copy_(start.A)
                b.copy_(start.B)

    def updated(self, stored: Tensor) -> Tensor:
        """W + s · B A for each expert, in the dtype of W."""
        a, b = self.A.to(stored.dtype), self.B.to(stored.dtype)
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        stack = stored.reshape(len(a), *stored.shape[-2:])
        # Half-precision compute is for products with activations; the parameter keeps the dtype it has.
        with torch.autocast(stored.device.type, enabled=False):
            return torch.baddbmm(stack, left, right, alpha=self.scale).view_as(stored)


class ExpertFactors(Substitute):
    """The factors of a module's bare parameters."""

    tokenwise: ClassVar[bool | None] = True

    def __init__(self, method: Any, site: Site, names: tuple[str, ...]):
        super().__init__(site)
        self.names = names
        self.factors = nn.ModuleDict({name: Pair(method, site, name) for name in names})

    def pair(self, name: str) -> Pair:
        """The factors of one parameter."""
        found = self.factors[name]
        assert isinstance(found, Pair)
        return found

    def values(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W + s · B A for each of the parameters."""
        return {name: self.pair(name).updated(parameters[name]) for name in self.names}


def outward(layer: ExpertFactors) -> dict[str, Tensor]:
    """Lay the factors out as HF PEFT does.

    It wraps the module once for each parameter, in their order, so that the last is outermost; A is `[E r, in]` and B
    `[out, r E]`.
    """
    found = {}
    for depth, name in enumerate(reversed(layer.names)):
        pair = layer.pair(name)
        found["base_layer." * depth + "A"] = pair.A.flatten(0, 1)
        found["base_layer." * depth + "B"] = pair.B.permute(1, 2, 0).flatten(1)
    return found


def inward(names: tuple[str, ...], site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `outward` for the tensors of one module; those that do not fit keep their names and are reported later."""
    found = dict(tensors)
    for depth, name in enumerate(reversed(names)):
        stored = site.module._parameters[name]
        experts = len(stored) if stored is not None and stored.dim() == 3 else 1
        a, b = (found.pop("base_layer." * depth + leaf, None) for leaf in ("A", "B"))
        if a is not None and len(a) % experts == 0:
            found[f"factors.{name}.A"] = a.unflatten(0, (experts, -1))
        if b is not None and b.shape[1] % experts == 0:
            found[f"factors.{name}.B"] = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return found
