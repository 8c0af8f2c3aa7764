"""Turning any adapter that is a product of two factors into an ordinary LoRA, which every tool reads."""

from __future__ import annotations

import re
from typing import Any

import torch

from adapterlab.core.adapter import Copy
from adapterlab.core.host import Host
from adapterlab.errors import AttachError


@torch.no_grad()
def as_lora(host: Host, name: str, new: str) -> None:
    """Attach a LoRA that computes what an adapter computes outside of training; it waits, inactive.

    Its rank is that of the adapter's factors: 2r for a Delta-LoRA, the rank in use for a DyLoRA, and so on. Save it
    with `host.save(folder, new)` for HF PEFT.

    Args:
        host: of the model.
        name: of the adapter, whose parts have `factors()` and `scale`.
        new: name for the LoRA.

    Raises:
        AttachError: it has parts that are not a product of two factors.
    """
    from adapterlab.methods.lora import LoRA

    parts: dict[str, Any] = host.adapters(name)
    layers = {path: part for path, part in parts.items() if not isinstance(part, Copy)}
    strange = [path for path, part in layers.items() if not hasattr(part, "factors")]
    if strange or not layers or host.part_methods(name) or host.patches[name]:
        where = f"{strange[0]} ({type(layers[strange[0]]).__qualname__})" if strange else "all of the model"
        raise AttachError(
            f"{name!r} ({host.methods[name].id}) cannot be written as a LoRA: at {where} it is not a product of two "
            "factors. Save it as it is, or merge it and extract a low-rank approximation."
        )
    tensors = {
        f"adapter.{path}.{k}": v for path, c in parts.items() if path not in layers for k, v in c.state_dict().items()
    }
    ranks, alphas = {}, {}
    for path, layer in layers.items():
        mode = layer.training
        a, b = layer.eval().factors()
        layer.train(mode)
        key = re.escape(path)
        ranks[key], alphas[key] = len(a), layer.scale * len(a)
        tensors |= {f"adapter.{path}.A": a, f"adapter.{path}.B": b}
        if getattr(layer, "bias", None) is not None:
            tensors[f"adapter.{path}.bias"] = layer.bias
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    method = LoRA(
        targets=tuple(layers),
        r=r,
        alpha=alpha,
        lora_bias=any(key.endswith(".bias") for key in tensors),
        rank_pattern={key: value for key, value in ranks.items() if value != r},
        alpha_pattern={key: value for key, value in alphas.items() if value != alpha},
        modules_to_save=tuple(path for path in parts if path not in layers),
    )
    host.attach(method, new, active=False, saved={key: value.detach() for key, value in tensors.items()})
