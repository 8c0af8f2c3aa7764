"""Writing trained adapters into the base's weights, and taking them out again to the bit."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter, Copy
from adapterlab.core.site import UNMERGED, Site
from adapterlab.engine.substitute import Substitute
from adapterlab.engine.wrapping import adapters_of, wrapped
from adapterlab.errors import MergeError
from adapterlab.foreign.model import base_modules, computes_by_ties, plain_class, tying_configs, unwrapped
from adapterlab.foreign.quantized import compute_dtype, packed_tensor
from adapterlab.foreign.sharding import is_sharded

if TYPE_CHECKING:
    from adapterlab.engine.attachments import Attachments


@dataclass
class Merged:
    """What a merge changed in one module: the parameters it replaced, and the class if it was a packed one.

    The originals are kept as objects, not copied: replacing them unties a shared weight, and putting them back
    restores the tie and every bit. The first of several merges leaves a stand-in with the original parameters at the
    module, for `Site.unmerged`.
    """

    module: nn.Module
    originals: dict[str, nn.Parameter | None]
    cls: type[nn.Module] | None = None
    first: bool = True
    buffers: dict[str, Tensor | None] = field(default_factory=dict)

    def undo(self) -> None:
        """Put the originals back."""
        if self.cls is not None:
            self.module.__class__ = self.cls
        self.module._parameters.update(self.originals)
        self.module._buffers.update(self.buffers)
        if self.first:
            del self.module.__dict__[UNMERGED]


@dataclass
class Untied:
    """What the configurations said about tied tables before a merge took some of them apart."""

    said: list[tuple[Any, Any]]

    def undo(self) -> None:
        """Say it again."""
        for config, value in self.said:
            config.tie_word_embeddings = value


@torch.no_grad()
def merge(
    host: Attachments,
    name: str,
    tied: Literal["error", "untie"] = "error",
    quantized: Literal["error", "dequantize"] = "error",
) -> list[Merged | Untied]:
    """Write an adapter into the weights of its modules; see `Host.merge`."""
    if is_sharded(host.model):
        raise MergeError(
            f"{name!r} cannot be merged here: the weights are split among processes, and a merge needs whole ones. "
            "Gather first: host.save the adapter, load the base and the adapter in one process, and merge there."
        )
    host.check_intact(name)
    held = [(key, path, a) for key in host.parts(name) for path, a in host.adapters(key).items()]
    parts = [part for part in held if not part[2].idle]
    for key, path, adapter in parts:
        _check(host, name, key, path, adapter, tied, quantized)
    if any(site.tied for *_, a in parts if not a.resident and not a.alike for site in _inside(host, a)):
        _check_untying(host.model)
    host.refresh(name, entries=True)  # they may be ahead of what the last forward pass put into the base
    done: list[Merged] = []
    together: dict[int, nn.Parameter] = {}
    for _, _, adapter in parts:
        mode = adapter.training
        adapter.eval()
        if adapter.alike:
            done.append(_merge_tied(adapter, together))
        elif not adapter.resident:
            done += _merge_one(adapter, getattr(host.model, "dtype", torch.float32))
        adapter.train(mode)
        adapter.is_merged = not adapter.outlives
    return [*done, *_untied(host, done)]


def _inside(host: Attachments, adapter: Adapter) -> list[Site]:
    """Return the sites whose weights a merge of an adapter replaces."""
    if not isinstance(adapter, Copy):
        return [adapter.site]
    lead = f"{adapter.site.path}."
    return [site for site in host.all_sites() if site.path == adapter.site.path or site.path.startswith(lead)]


def _check_untying(model: nn.Module) -> None:
    if tying_configs(model) and computes_by_ties(model):
        raise MergeError(
            f"{plain_class(model).__name__} computes something else when its tables are not tied (it reads "
            "tie_word_embeddings), so merging into one of them would change its answers. Keep the adapter (host.save), "
            "or leave the tied modules out of it."
        )


def _untied(host: Attachments, done: list[Merged]) -> list[Merged | Untied]:
    """Say in the configuration that tables are apart, when a merge took some apart.

    One setting speaks of all that a model ties, so what is still shared gets weights of its own: a saved model has
    only one of two that share, and loading it would leave the other empty.
    """
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, module in base_modules(host.model):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, key))
    configs = tying_configs(host.model)
    if not configs or not any(id(p) in holders for record in done for p in record.originals.values() if p is not None):
        return []
    again = [place for places in holders.values() for place in places[1:]]
    apart = [_replace(module, {key: module._parameters[key].detach().clone()}) for module, key in again]  # type: ignore[union-attr]
    said = Untied([(config, config.tie_word_embeddings) for config in configs])
    for config in configs:
        config.tie_word_embeddings = False
    return [*apart, said]


def _merge_one(adapter: Adapter, model_dtype: torch.dtype) -> list[Merged]:
    """Merge one adapter; a class that unpacks its weight casts its input too, so the model's dtype replaces its own."""
    site = adapter.site
    if isinstance(adapter, Copy):
        pairs = [(unwrapped(site.module.get_submodule(path)), copied) for path, copied in adapter.copy.named_modules()]
        return [_replace(module, _as_stored(module, copied)) for module, copied in pairs]
    dtype = torch.promote_types(site.dtype, torch.float32)
    if isinstance(adapter, Substitute):
        present = {key: p.detach() for key, p in site.module._parameters.items() if p is not None}
        values = adapter.values({key: present[key].to(dtype) for key in adapter.names})
        return [_replace(site.module, {key: value.to(present[key].dtype) for key, value in values.items()})]
    bias = site.bias
    held = None if bias is None else bias.detach().to(dtype)
    weight, shift = adapter.merged(site.weight().to(dtype), held)
    unpacks = site.quantized and not packed_tensor(site.module)
    outside = model_dtype if unpacks else compute_dtype(site.module)
    new = {"weight": site.stored(weight).to(outside).contiguous()}
    if shift is not None and (shift is not held or unpacks):  # one that stays as it is may be shared with others
        new["bias"] = shift.to(outside)
    return [_replace(site.module, new, plain=unpacks)]


def _merge_tied(adapter: Adapter, together: dict[int, nn.Parameter]) -> Merged:
    """Merge one of several adapters that change a weight alike where it is held: what they merge into stays one."""
    module: Any = adapter.site.module
    before = id(module._parameters["weight"])
    if before not in together:
        [record] = _merge_one(adapter, compute_dtype(module))
        together[before] = module._parameters["weight"]
        return record
    record = _replace(module, {"weight": together[before].detach()})
    module._parameters["weight"] = together[before]
    return record


def _as_stored(module: nn.Module, copied: nn.Module) -> dict[str, Tensor]:
    """Return the values of a trained copy in the dtypes of the module, whose neighbours compute in them."""
    present = {**module._parameters, **module._buffers}
    held = {**copied._parameters, **copied._buffers}
    return {k: v.detach().to(present[k].dtype) for k, v in held.items() if v is not None and present[k] is not None}  # type: ignore[union-attr]


def _replace(module: nn.Module, new: dict[str, Tensor], plain: bool = False) -> Merged:
    first = UNMERGED not in module.__dict__
    if first:
        before = copy.copy(module)
        before.__dict__ = {**module.__dict__, "_parameters": dict(module._parameters), "_modules": {}}
        module.__dict__[UNMERGED] = before
    buffers = {key: module._buffers[key] for key in new if key in module._buffers}
    originals = {key: module._parameters.get(key) for key in new if key not in buffers}
    record = Merged(module, originals, type(module) if plain else None, first, buffers)
    for key, value in new.items():
        if key in buffers:
            module._buffers[key] = value.clone()
        else:
            module._parameters[key] = nn.Parameter(value, requires_grad=False)
    if plain:
        # The packed class would unpack what is plain now; it is a subclass of nn.Linear, whose forward is right.
        linear: Any = nn.Linear
        module.__class__ = wrapped(linear)
    return record


def _check(host: Attachments, name: str, key: str, path: str, adapter: Adapter, tied: str, quantized: str) -> None:
    site, method = adapter.site, host.methods[name].id
    if name in host.merged:
        raise MergeError(f"{name!r} is merged already; call host.restore({name!r}) first.")
    if adapter.resident:
        return
    has_weight = site.kind != "block" or isinstance(adapter, (Copy, Substitute))
    if adapter.not_linear or adapter.place != "call" or not has_weight:
        inside = "" if adapter.place == "call" else "it works inside the attention core"
        reason = inside or adapter.not_linear or "what it stands around has no weight of its own"
        where = path or "the whole model"
        raise MergeError(
            f"{method} cannot be merged into {where}: {reason}. Keep it as an adapter (host.save), or extract a "
            "low-rank approximation of what it does."
        )
    if site.tied and tied == "error" and not isinstance(adapter, Copy) and not adapter.alike:
        raise MergeError(
            f"The weight of {path} is tied to another module, which a merge would change too. Merge with tied='untie' "
            "to give this module a weight of its own (the saved model then says tie_word_embeddings=False), or exclude "
            f"{path} from the targets."
        )
    if site.quantized and quantized == "error":
        raise MergeError(
            f"The weight of {path} is stored packed ({type(site.module).__name__}): merging into it loses precision. "
            "Merge with quantized='dequantize' to replace it by a plain weight, or load the base without quantization."
        )
    _check_order(host, key, path, adapter, site)


def _check_order(host: Attachments, key: str, path: str, adapter: Adapter, site: Site) -> None:
    """Adapters merge from the inside out; only additive ones commute."""
    for other, inner in adapters_of(site.module).items():
        if other == key:
            return
        live = other in host.state.active and not (inner.is_merged or inner.idle) and inner.place == "call"
        if live and not (inner.additive and adapter.additive):
            raise MergeError(
                f"At {path} the adapter {other!r} stands inside {key!r} and is live: merge {other!r} first, or switch "
                "it off."
            )
