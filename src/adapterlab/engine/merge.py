"""Writing trained adapters into the base's weights, and taking them out again to the bit."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter, Copy
from adapterlab.core.site import UNMERGED, Site
from adapterlab.engine.substitute import Substitute
from adapterlab.engine.wrapping import adapters_of, wrapped
from adapterlab.errors import MergeError
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

    def undo(self) -> None:
        """Put the originals back."""
        if self.cls is not None:
            self.module.__class__ = self.cls
        self.module._parameters.update(self.originals)
        if self.first:
            del self.module.__dict__[UNMERGED]


@torch.no_grad()
def merge(
    host: Attachments,
    name: str,
    tied: Literal["error", "untie"] = "error",
    quantized: Literal["error", "dequantize"] = "error",
) -> list[Merged]:
    """Write an adapter into the weights of its modules; see `Host.merge`."""
    if is_sharded(host.model):
        raise MergeError(
            f"{name!r} cannot be merged here: the weights are split among processes, and a merge needs whole ones. "
            "Gather first: host.save the adapter, load the base and the adapter in one process, and merge there."
        )
    parts = [(site_key, path, a) for site_key in host.parts(name) for path, a in host.adapters(site_key).items()]
    for key, path, adapter in parts:
        _check(host, name, key, path, adapter, tied, quantized)
    done = []
    for _, _, adapter in parts:
        mode = adapter.training
        adapter.eval()
        if not adapter.resident:
            done += _merge_one(adapter, getattr(host.model, "dtype", torch.float32))
        adapter.train(mode)
        adapter.is_merged = True
    return done


def _merge_one(adapter: Adapter, model_dtype: torch.dtype) -> list[Merged]:
    """Merge one adapter; a class that unpacks its weight casts its input too, so the model's dtype replaces its own."""
    site = adapter.site
    if isinstance(adapter, Copy):
        pairs = [(site.module.get_submodule(path), copied) for path, copied in adapter.copy.named_modules()]
        return [_replace(m, {k: p.detach() for k, p in c.named_parameters(recurse=False)}) for m, c in pairs]
    dtype = torch.promote_types(site.dtype, torch.float32)
    if isinstance(adapter, Substitute):
        present = {key: p.detach() for key, p in site.module._parameters.items() if p is not None}
        values = adapter.values({key: present[key].to(dtype) for key in adapter.names})
        return [_replace(site.module, {key: value.to(present[key].dtype) for key, value in values.items()})]
    bias = site.bias
    weight, shift = adapter.merged(site.weight().to(dtype), None if bias is None else bias.detach().to(dtype))
    unpacks = site.quantized and not packed_tensor(site.module)
    outside = model_dtype if unpacks else compute_dtype(site.module)
    new = {"weight": site.stored(weight).to(outside).contiguous()}
    if shift is not None:
        new["bias"] = shift.to(outside)
    return [_replace(site.module, new, plain=unpacks)]


def _replace(module: nn.Module, new: dict[str, Tensor], plain: bool = False) -> Merged:
    first = UNMERGED not in module.__dict__
    if first:
        before = copy.copy(module)
        before.__dict__ = {**module.__dict__, "_parameters": dict(module._parameters), "_modules": {}}
        module.__dict__[UNMERGED] = before
    originals = {key: module._parameters.get(key) for key in new}
    record = Merged(module, originals, type(module) if plain else None, first)
    for key, value in new.items():
        module._parameters[key] = nn.Parameter(value, requires_grad=False)
    if plain:
        # The packed class would unpack what is plain now; it is a subclass of nn.Linear, whose forward is right.
        linear: Any = nn.Linear
        module.__class__ = wrapped(linear)
    return record


def _check(host: Attachments, name: str, key: str, path: str, adapter: Adapter, tied: str, quantized: str) -> None:
    site, method = adapter.site, host.methods[name].id
    if adapter.is_merged:
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
    if site.tied and tied == "error" and not isinstance(adapter, Copy):
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
        live = other in host.state.active and not inner.is_merged and inner.place == "call"
        if live and not (inner.additive and adapter.additive):
            raise MergeError(
                f"At {path} the adapter {other!r} stands inside {key!r} and is live: merge {other!r} first, or switch "
                "it off."
            )
