"""What training did to a model, module by module: the common ground of combining, extracting and analysing.

A change is the difference of the weights that a merge would write and those of the base, so it exists for every method
that can be merged, and for a fully tuned model as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapterlab.convert.low_rank import Factors, wide
from adapterlab.core.adapter import Adapter, Copy, Delta
from adapterlab.core.site import Site
from adapterlab.engine.merge import _check as check_mergeable
from adapterlab.engine.patches import Patch
from adapterlab.engine.substitute import Substitute
from adapterlab.engine.wrapping import adapters_of
from adapterlab.errors import FormatError, MergeError
from adapterlab.foreign.model import base_modules
from adapterlab.hosts import Host
from adapterlab.io.finite import not_finite

MATRICES = ("linear", "embedding")


@dataclass(frozen=True)
class Change:
    """What training did to one module.

    Attributes:
        site: the module.
        weight: `[out, in]` in float32 or float64, for a module with one weight matrix that changed; else None.
        others: changes of the other parameters by their name in the module, in their stored shape.
        factors: `weight` as a product, when the adapter is one.
        floor: singular values of `weight` up to here may be rounding.
        whole: the module was trained as a copy (`modules_to_save`), which stays one.

    Raises:
        MergeError: the change holds values that are not finite.
    """

    site: Site
    weight: Tensor | None = None
    others: dict[str, Tensor] = field(default_factory=dict)
    factors: Factors | None = None
    floor: float = 0.0
    whole: bool = False

    def __post_init__(self) -> None:
        there = {**self.others, **({} if self.weight is None else {"weight": self.weight})}
        if (leaf := not_finite(there)) is not None:
            raise MergeError(
                f"The change of {self.site.path}.{leaf} holds values that are not finite: the base or what was trained "
                "is damaged. Take an earlier checkpoint, or another copy of the base."
            )

    @property
    def rank(self) -> int:
        """The rank known without a decomposition: that of the factors, else the smaller side."""
        return self.factors.rank if self.factors is not None else min(self.site.shape)

    def norm(self) -> float:
        """Frobenius norm of everything that changed."""
        tensors = [*self.others.values(), *([] if self.weight is None else [self.weight])]
        return math.sqrt(sum(float(wide(t).square().sum()) for t in tensors))


class Changes:
    """The changes of one adapter or model. Each is computed when it is asked for, so only one is in memory.

    Attributes:
        sites: the modules that may have changed, by path, in model order.
    """

    sites: dict[str, Site]

    def at(self, path: str) -> Change | None:
        """Return the change at one module, or None when there is none."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Change]:
        for path in self.sites:
            change = self.at(path)
            if change is not None:
                yield change


class AdapterChanges(Changes):
    """What an adapter of any linear method would write into the weights. Use it inside `host.using()`.

    Raises:
        MergeError: the adapter is not linear.
    """

    def __init__(self, host: Host, name: str):
        self.host = host
        self.keys = host.parts(host.only(name))
        wrapped: dict[str, list[Adapter]] = {}
        for key in self.keys:
            for path, adapter in host.adapters(key).items():
                check_mergeable(host, name, key, path, adapter, "untie", "dequantize")
                wrapped.setdefault(path, []).append(adapter)
        every = [patch for key in self.keys for patch in host.patches[key].values()]
        # By identity: a tied parameter changes in both modules that hold it.
        self.patches = {id(host.model.get_parameter(patch.path)): patch for patch in every}
        self.copies = {p: a.copy for p, adapters in wrapped.items() for a in adapters if isinstance(a, Copy)}
        self.sites = {site.path: site for site in host.all_sites() if self._touched(site, wrapped)}

    def _touched(self, site: Site, wrapped: dict[str, list[Adapter]]) -> bool:
        patched = any(id(p) in self.patches for p in site.module._parameters.values() if p is not None)
        return patched or site.path in wrapped or self._copy_of(site.path) is not None

    def _copy_of(self, path: str) -> nn.Module | None:
        """The module that is used instead of one, when the adapter copied it or a module around it."""
        for outer, copy in self.copies.items():
            if path == outer or path.startswith(f"{outer}."):
                return copy.get_submodule(path[len(outer) + 1 :])
        return None

    def _patched(self, parameter: nn.Parameter, patch: Patch) -> Tensor:
        """The value that an adapter which lives in the base's parameters has for one, while it is switched off."""
        value, entries = patch.value(self.host.model).detach(), patch.entries
        if entries is None:
            return value
        whole = exact(parameter).clone()
        entries.seen(whole)[entries.places()] = value.to(whole.dtype)
        return whole

    @torch.no_grad()
    def at(self, path: str) -> Change | None:
        """The change at one module; adapters that stand around it act in order of attachment."""
        if path not in self.sites:
            return None
        site, copied = self.sites[path], self._copy_of(path)
        if copied is not None:
            return _difference(site, {k: p for k, p in copied._parameters.items() if p is not None}, whole=True)
        held = adapters_of(site.module)
        parts = [a for key, a in held.items() if key in self.keys and not a.resident]
        own = {k: p for k, p in site.module._parameters.items() if p is not None}
        patched = {k: self._patched(p, self.patches[id(p)]) for k, p in own.items() if id(p) in self.patches}
        for part in [part for part in parts if isinstance(part, Substitute)]:
            parts.remove(part)
            patched |= part.values({leaf: exact(patched.get(leaf, own[leaf])) for leaf in part.names})
        if not parts:
            return _difference(site, patched)
        return _adapted(site, parts, patched)


class ModelChanges(Changes):
    """The differences between a tuned model and its base.

    Args:
        base: the model before training.
        tuned: the model after it, of the same shape.

    Raises:
        FormatError: the models differ in modules or shapes.
    """

    def __init__(self, base: nn.Module, tuned: nn.Module):
        self.sites = {site.path: site for site in Host(base).all_sites() if site.module._parameters}
        self.tuned = dict(base_modules(tuned))
        for path, site in self.sites.items():
            _check_shapes(path, site.module, self.tuned.get(path))

    @torch.no_grad()
    def at(self, path: str) -> Change | None:
        """The difference at one module."""
        if path not in self.sites:
            return None
        new = {k: p.detach() for k, p in self.tuned[path]._parameters.items() if p is not None}
        return _difference(self.sites[path], new)


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is that."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def oriented(site: Site, weight: Tensor) -> Tensor:
    """Turn a weight between the way the module stores it and `[out, in]`; its own inverse."""
    return weight.T if site.transposed or site.kind == "embedding" else weight


def _difference(site: Site, new: dict[str, Tensor], whole: bool = False) -> Change | None:
    """The change from a module's own parameters to others."""
    own = site.module._parameters
    changed: dict[str, Tensor] = {}
    for leaf, value in new.items():
        base: Any = own[leaf]
        there = exact(base)
        delta = exact(value).to(there.device) - there
        if bool(delta.any()):
            changed[leaf] = delta
    weight = changed.pop("weight", None) if site.kind in MATRICES else None
    if weight is None and not changed:
        return None
    floor = _rounding(new["weight"], _stored_eps(new["weight"])) if weight is not None else 0.0
    return Change(site, None if weight is None else oriented(site, weight), changed, floor=floor, whole=whole)


def _adapted(site: Site, parts: list[Adapter], patched: dict[str, Tensor]) -> Change | None:
    dtype = torch.promote_types(site.dtype, torch.float32)
    base, bias = site.weight().to(dtype), None if site.bias is None else site.bias.detach().to(dtype)
    start = oriented(site, patched["weight"]).to(dtype) if "weight" in patched else base
    shift = patched["bias"].to(dtype) if "bias" in patched else bias
    # What adapters add does not depend on the weight, and from zero it comes without the rounding of a difference.
    additive = all(part.additive for part in parts)
    weight = torch.zeros_like(base) if additive else start
    for part in parts:
        mode = part.training
        part.eval()
        weight, shift = part.merged(weight, shift)
        part.train(mode)
    known = _whole(parts)
    delta = known.dense() if known is not None else weight + (start - base) if additive else weight - base
    others = {} if shift is None else {"bias": shift if bias is None else shift - bias}
    others = {leaf: value for leaf, value in others.items() if bool(value.any())}
    if not bool(delta.any()):
        return Change(site, None, others) if others else None
    floor = _rounding(delta if additive else weight, 4 * torch.finfo(dtype).eps)
    if known is not None:
        return Change(site, delta, others, known, floor)
    if "weight" in patched:
        floor = max(floor, _rounding(patched["weight"], _stored_eps(patched["weight"])))
    return Change(site, delta, others, _factors(parts, delta), floor)


def _whole(parts: list[Adapter]) -> Factors | None:
    """The whole change as its adapter knows it; the base weight that holds a part of it is rounded."""
    found = parts[0].change() if len(parts) == 1 and isinstance(parts[0], Delta) else None
    return None if found is None else Factors(parts[0].scale * found[1].detach(), found[0].detach())  # type: ignore


def _factors(parts: list[Adapter], delta: Tensor) -> Factors | None:
    """The two tensors of which an update is the product up to a number, when its adapter has such tensors."""
    if len(parts) != 1 or not isinstance(parts[0], Delta):
        return None
    tensors = (*_made(parts[0]), *parts[0].parameters())
    matrices = [t.detach().to(delta.dtype) for t in tensors if isinstance(t, Tensor) and t.ndim == 2]
    for a in matrices:
        for b in matrices:
            if a is b or (b.shape[0], a.shape[1]) != tuple(delta.shape) or b.shape[1] != a.shape[0]:
                continue
            product = b @ a
            scale = float((product * delta).sum() / product.square().sum().clamp_min(1e-30))
            if torch.linalg.norm(delta - scale * product) <= 1e-5 * torch.linalg.norm(delta):
                return Factors(scale * b, a)
    return None


def _made(part: Delta) -> tuple[Tensor, ...]:
    """The tensors that an adapter says it makes its update of, when these are not its parameters."""
    mode = part.training
    made = part.eval().factors()
    part.train(mode)
    return made or ()


def _stored_eps(weight: Tensor) -> float:
    """Relative spacing of the numbers a weight consists of, which may be coarser than what its dtype allows."""
    for dtype in (torch.bfloat16, torch.float16):
        if bool((weight.to(dtype).to(weight.dtype) == weight).all()):
            return torch.finfo(dtype).eps / 3  # rounding errs by 0.19 eps (root mean square); the rest is for outliers
    return torch.finfo(torch.float32).eps


def _rounding(weight: Tensor, eps: float) -> float:
    """Largest singular value that rounding noise of this relative size is expected to have in a matrix."""
    rms = float(wide(weight).square().mean().sqrt())
    return eps * rms * sum(math.sqrt(side) for side in weight.shape)


def _check_shapes(path: str, base: nn.Module, tuned: nn.Module | None) -> None:
    ours = {k: tuple(p.shape) for k, p in base._parameters.items() if p is not None}
    theirs = {k: tuple(p.shape) for k, p in tuned._parameters.items() if p is not None} if tuned is not None else {}
    if ours != theirs:
        raise FormatError(
            f"The two models do not belong together: {path} has {ours} in the base and {theirs or 'is missing'} in the "
            "tuned model. Give the base that was tuned; if its vocabulary was resized, resize the base's too."
        )
