"""Low-rank updates in the form of AdapterHub's library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapterlab.core.carrier import Carrier
from adapterlab.core.hub import VERSION, Options, taken
from adapterlab.errors import FormatError
from adapterlab.methods.low_rank import _hub_places
from adapterlab.methods.low_rank._factors import Factors

_QKV = "qkv"
_RIGHT = (1, 1)  # version from which the library's factor is alpha / r; before, it was one


def read(host: Carrier, options: Options, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Where the factors stand, their scale, and the parts of a fused module that have some."""
    sites, r = _hub_places.targets(host, tensors), options.get("r", 8)
    fused = {site.shape[0] for site in sites.values() if site.role == _QKV}
    version = re.fullmatch(r"adapters\.(\d+)\.(\d+).*", str(options.get(VERSION, "")))
    wrong = version is not None and (int(version[1]), int(version[2])) < _RIGHT
    found = {"r": r, "alpha": r if wrong else options.get("alpha", 8), "targets": _hub_places.as_targets(sites)}
    if not fused:
        return found
    on = tuple(matrix in options.get("attn_matrices", ("q", "v")) for matrix in _QKV)
    return {**found, "blocks": (fused.pop() // 3,) * 3, "enable": on}


def outward(host: Carrier, key: str, method: Any, plain: tuple[type, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write the factors of every module, which share a rank and a scale there."""
    layers: Mapping[str, Any] = host.adapters(key)
    odd = [path for path, layer in layers.items() if type(layer) not in plain or layer.A0 is not None]
    ranks = {(method.rank(path), layer.scale) for path, layer in layers.items() if isinstance(layer, Factors)}
    if odd or len(ranks) != 1 or method.lora_bias or method.bias != "none" or host.patches[key]:
        raise FormatError(
            "AdapterHub's LoRA is two factors of one rank and scale at every module, started beside the base and "
            f"without biases; this {method.id} adapter is more{f', at {odd[0]}' if odd else ''}. Keep our own form, or "
            "HF PEFT's."
        )
    [(r, scale)] = ranks
    tensors = {_hub_places.key(p, f"lora_{k}"): getattr(a, k).detach() for p, a in layers.items() for k in "AB"}
    on = method.enable or (True,) * 3
    fused = "".join(matrix for matrix, there in zip(_QKV, on, strict=False) if there)
    where = _hub_places.options(host, {path: layer.site for path, layer in layers.items()}, fused)
    if any(layer.site.role == _QKV and not method.blocks for layer in layers.values()):
        raise FormatError(
            "AdapterHub's LoRA of a fused qkv has factors for each of the three, and this one has one pair. Keep our "
            "own form, or train with blocks."
        )
    return {"r": r, "alpha": scale * r, **where}, tensors


def inward(host: Carrier, key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the factors of every module."""
    names = [(path, leaf) for path in host.adapters(key) for leaf in "AB"]
    return {f"adapter.{path}.{leaf}": taken(tensors, _hub_places.key(path, f"lora_{leaf}")) for path, leaf in names}
