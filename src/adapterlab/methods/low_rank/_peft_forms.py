"""Low-rank updates in other forms: fused blocks as one matrix, and every kind as an ordinary LoRA of HF PEFT."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterlab.core.site import Site
from adapterlab.errors import FormatError
from adapterlab.methods.low_rank import _expert_factors
from adapterlab.methods.low_rank._expert_factors import ExpertFactors


def spread(b: Tensor, blocks: Sequence[int], enable: Sequence[bool]) -> Tensor:
    """Write the B of n enabled blocks `[rows of them, r]` as one matrix `[all rows, n r]`."""
    r, n = b.shape[1], sum(enable)
    rows = [b.new_zeros(size, n * r) for size in blocks]
    for j, (i, start) in enumerate(_enabled(blocks, enable)):
        rows[i] = F.pad(b[start : start + blocks[i]], (j * r, (n - 1 - j) * r))
    return torch.cat(rows)


def gathered(b: Tensor, blocks: Sequence[int], enable: Sequence[bool]) -> Tensor:
    """Undo `spread`."""
    r = b.shape[1] // sum(enable)
    parts = b.split(list(blocks))
    return torch.cat([parts[i][:, j * r : (j + 1) * r] for j, (i, _) in enumerate(_enabled(blocks, enable))])


def _enabled(blocks: Sequence[int], enable: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Index of each enabled block, and where its rows start among those of the enabled ones."""
    start = 0
    for i, on in enumerate(enable):
        if on:
            yield i, start
            start += blocks[i]


def outward(method: Any, layers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """Write an adapter as ordinary LoRA on the original base.

    What the base gave up is subtracted by more rank: s (B A − B0 A0) = s [B, −B0] [A; A0].

    Returns:
        (options of PEFT, tensors by path and name); None where PEFT has no such adapter.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    settings: dict[str, tuple[int, float]] = {}
    modules = {path: layer for path, layer in layers.items() if not isinstance(layer, ExpertFactors)}
    for path, layer in layers.items():
        if not isinstance(layer, ExpertFactors):
            continue
        # PEFT has no parameters beside transposed layers, and tensors of embeddings have names of their own there.
        if layer.site.kind in ("embedding", "conv") or any(other.site.transposed for other in modules.values()):
            return None
        tensors[path] = _expert_factors.outward(layer)
        for leaf in layer.names:
            r = layer.pair(leaf).A.shape[1]
            settings[f"{path}.{leaf}"] = (r, _alpha(method, layer.pair(leaf).scale, r))
    for path, layer in modules.items():
        taken = layer.A0 is not None
        if _differs(layer.site) or (taken and not layer.init.low_rank):
            return None
        a, b = layer.factors() if method.blocks else (layer.A, layer.B)
        if taken:
            a, b = torch.cat([a, layer.A0]), torch.cat([b, -layer.B0], 1)
        settings[path] = (len(a), _alpha(method, layer.scale, len(a)))
        if layer.site.kind == "conv":
            kernel = [1] * len(layer.site.module.kernel_size)
            a, b = layer.site.stored(a), b.view(*b.shape, *kernel)
        rest = {k: v for k, v in layer.state_dict(keep_vars=True).items() if k not in ("A", "B", "A0", "B0")}
        tensors[path] = {"A": a, "B": b, **rest}
    wanted = {path: (r := method.rank(path), _alpha(method, method.scaling(path), r)) for path in settings}
    plain = settings == wanted
    return {"init_lora_weights": True} | ({} if plain else _patterns(settings)), tensors


def _alpha(method: Any, scale: float, r: int) -> float:
    """The alpha that gives a scale at a rank."""
    return scale * (r if method.scale == "linear" else math.sqrt(r))


def _patterns(settings: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """PEFT's options for a rank and an alpha of each module: the most common ones, and the exceptions by path."""
    r, alpha = Counter(settings.values()).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {path: found for path, (found, _) in settings.items() if found != r},
        "alpha_pattern": {path: found for path, (_, found) in settings.items() if found != alpha},
    }


def inward(method: Any, site: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read one module of an ordinary LoRA as the method keeps it.

    Raises:
        FormatError: PEFT computes a convolution of this kind in another way.
    """
    names = _expert_factors.adapted(method, site)
    if names:
        return _expert_factors.inward(names, site, tensors)
    if not {"A", "B"} <= tensors.keys():
        return tensors
    a, b = tensors["A"], tensors["B"]
    if site.kind == "conv":
        if _differs(site):
            raise FormatError(
                f"{site.path} has groups, a dilation or a padding that PEFT's adapters of convolutions leave out, so "
                "its file means something else there. Train the adapter with adapterlab, which keeps them."
            )
        a, b = a.flatten(1), b.flatten(1)
    if method.blocks and site.kind == "linear" and site.shape[0] == sum(method.blocks):
        b = gathered(b, method.blocks, method.enable or (True,) * len(method.blocks))
    elif method.init.moves_base and len(a) == 2 * (r := method.rank(site.path)):
        return {**tensors, "A": a[:r], "A0": a[r:], "B": b[:, :r], "B0": -b[:, r:]}
    return {**tensors, "A": a, "B": b}


def _differs(site: Site) -> bool:
    """Say whether PEFT computes an adapter of a convolution without something that the base has.

    Its first kernel mixes the channels of all groups, is not dilated, and pads with zeros.
    """
    if site.kind != "conv":
        return False
    module: Any = site.module
    dilated = any(d > 1 < k for d, k in zip(module.dilation, module.kernel_size, strict=True))
    padded = module.padding_mode != "zeros" and module.padding not in ("valid",) and any(module.padding)
    return module.groups > 1 or dilated or padded
