"""Prefixes in the form of AdapterHub's library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterlab.core.carrier import Carrier
from adapterlab.core.hub import Options, taken
from adapterlab.errors import FormatError
from adapterlab.foreign.adapter_hub import check_known
from adapterlab.foreign.model import attention_limits, is_encoder_decoder

_POOL = "prefix_tuning.prefix_tunings"
_PLACE = "self_prefix"
_TENSOR = f"{_PLACE}.control_trans"


def read(options: Options) -> dict[str, Any]:
    """Further fields: tokens keep their positions, and what a network made is read as the numbers it makes."""
    if not options.get("flat", True) and options.get("non_linearity", "tanh") != "tanh":
        raise FormatError(f"non_linearity={options['non_linearity']!r} of a prefix's network has no form here.")
    return {"init": "zeros", "offset": 0}


def layers_of(host: Carrier, key: str) -> dict[str, Any]:
    """The prefixes of an adapter by the path of their attention module.

    Raises:
        FormatError: the library computes something else on this model.
    """
    check_known(host.model)
    if is_encoder_decoder(host.model):
        raise FormatError(
            "In an encoder-decoder AdapterHub's prefixes meet relative positions in another way than those here, so "
            "they are not exchanged there. Use them with the library `adapters` itself."
        )
    return {path: part for path, part in host.adapters(key).items() if hasattr(part, "pairs")}


def root(host: Carrier) -> str:
    """Where the library keeps all prefixes: at the backbone."""
    path = host.path_of(host.backbone)
    return f"{path}.{_POOL}" if path else _POOL


def outward(host: Carrier, key: str, method: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write all numbers as the library's one tensor, at the backbone and once more at each attention module."""
    layers = layers_of(host, key)
    if len(layers) != len(host.attentions) or method.first_position or attention_limits(host.model):
        raise FormatError(
            "AdapterHub's prefixes stand in every attention module, and tokens keep their positions (offset=0); this "
            "one does otherwise, or a window limits the attention. Keep our own form."
        )
    pairs = torch.stack([part.pairs().detach() for part in layers.values()])  # [layers, 2, heads, P, width]
    places = [root(host), *(f"{path}.prefix_tuning.pool.prefix_tunings" for path in layers)]
    return {"flat": True}, {f"{place}.{_TENSOR}": pairs.permute(3, 0, 1, 2, 4).flatten() for place in places}


def inward(host: Carrier, key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut the library's tensor into layers; what stands at attention modules is the same once more."""
    layers = layers_of(host, key)
    _, heads, length, width = next(iter(layers.values())).pairs().shape
    flat, shape = _flat(root(host), tensors), (length, len(layers), 2, heads, width)
    if flat.numel() != torch.Size(shape).numel():
        raise FormatError(
            f"The prefix has {flat.numel()} numbers, and this model needs {list(shape)}: it is of another."
        )
    for repeated in [k for k in tensors if ".prefix_tuning.pool." in k]:
        del tensors[repeated]
    every = zip(layers, flat.view(shape).permute(1, 2, 3, 0, 4), strict=True)
    return {f"adapter.{path}.prefix": pairs for path, pairs in every}


def _flat(where: str, tensors: dict[str, Tensor]) -> Tensor:
    """All numbers, computed by the network that may stand in their place."""
    if f"{where}.{_TENSOR}" in tensors:
        return taken(tensors, f"{where}.{_TENSOR}")
    table = taken(tensors, f"{where}.{_PLACE}.wte.weight")
    inner, outer = ([taken(tensors, f"{where}.{_TENSOR}.{i}.{leaf}") for leaf in ("weight", "bias")] for i in (0, 2))
    return F.linear(torch.tanh(F.linear(table, *inner)), *outer).flatten()
