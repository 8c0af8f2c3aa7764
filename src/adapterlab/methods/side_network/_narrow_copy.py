"""Narrow copies of a stack of layers: the same classes, every width divided, weights cut out of the wide ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterlab.core.site import Site
from adapterlab.errors import AttachError
from adapterlab.foreign.model import plain_class
from adapterlab.foreign.roles import role_of

Score = Callable[[nn.Module], Tensor]  # importance [out, in] of a module's weight

_INNER = (
    "intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size",
    "shared_expert_intermediate_size",
)  # fmt: skip
_DEPTH = ("num_hidden_layers", "encoder_layers", "decoder_layers")


def narrow_config(config: Any, r: int, kept: Sequence[int]) -> Any:
    """Return a copy of a configuration with widths divided by r, the same heads, and only the kept layers.

    Args:
        config: of a model or stack of `transformers`.
        r: the divisor; widths are rounded down.
        kept: indices of the layers.
    """
    heads, width = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    rotary = getattr(config, "rope_parameters", None) is not None
    changes: dict[str, Any] = {name: max(1, value // r) for name in _INNER if (value := getattr(config, name, None))}
    changes["hidden_size"] = max(1, width // r)
    if rotary:
        changes["head_dim"] = max(2, (head or width // heads) // r // 2 * 2)  # rotation needs pairs
    elif head:
        changes["head_dim" if getattr(config, "head_dim", None) else "d_kv"] = max(1, head // r)
    else:
        changes["hidden_size"] = heads * max(1, width // heads // r)
    changes |= {name: len(kept) for name in _DEPTH if getattr(config, name, None)}
    if getattr(config, "layer_types", None):
        changes["layer_types"] = [config.layer_types[i] for i in kept]
    # The narrow stack never embeds tokens: a table of one row stands in.
    changes |= {"vocab_size": 1, "pad_token_id": None}
    narrow = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(narrow, name, value)
    if "flash" in (getattr(narrow, "_attn_implementation", None) or ""):
        narrow._attn_implementation = "sdpa"  # flash kernels take half precision only, the narrow stack is float32
    return narrow


def narrow_stack(stack: nn.Module, layers: str, r: int, kept: Sequence[int], like: Site) -> Any:
    """Build a narrow, randomly initialised stack of the same class, whose own embeddings are inert.

    Args:
        stack: a model or stack of `transformers`.
        layers: path of its list of layers.
        r: divisor of the widths.
        kept: indices of the layers.
        like: gives device and dtype.

    Raises:
        AttachError: the class cannot be built that narrow.
    """
    model: Any = stack
    config = narrow_config(model.config, r, kept)
    cls = plain_class(stack)
    try:
        narrow = cls(config).to(like.device, like.dtype)
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise AttachError(
            f"A {cls.__name__} of width {config.hidden_size} (r={r}) cannot be built: {error}. Choose an r that "
            "divides its widths, such as 2 or 4."
        ) from None
    if getattr(narrow, "pooler", None) is not None:
        narrow.pooler = None
    _still(narrow, layers)
    return narrow


def _still(narrow: nn.Module, layers: str) -> None:
    """Make what comes before the layers untrained and unsaved: its output is never used, only its shape."""
    before = True
    for path, module in list(narrow.named_modules()):
        inside = path == layers or path.startswith(layers + ".")
        before = before and not inside
        if inside or not (before or "embed" in path):
            continue
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[leaf]
                module.register_buffer(leaf, parameter.detach(), persistent=False)


def residual_dims(table: Tensor, count: int) -> Tensor:
    """Return the most important dimensions of the residual stream, in order.

    Args:
        table: importance `[width, anything]` of the token embedding or of another map into or out of the stream.
        count: how many to keep.
    """
    return _top(table.abs().sum(1), count)


def cut_layer(
    narrow: nn.Module, wide: nn.Module, first: nn.Module, dims: Tensor, config: Any, score: Score, prefix: str
) -> None:
    """Copy the most important rows and columns of a wide layer into a narrow one.

    Columns follow what was kept before: the residual dimensions, the head dimensions, the inner ones of the
    feed-forward. Head dimensions are chosen for each key-value head by the product of the row importances of queries,
    keys and values; inner ones by that of the matrices that lead there. Modules that are not recognised (experts,
    projections fused in an unknown order) keep their random start.

    Args:
        narrow: layer to fill.
        wide: layer to take from.
        first: layer to take from what only the first layer has, such as tables of relative positions.
        dims: kept residual dimensions.
        config: of the wide model.
        score: importance of a module's weight.
        prefix: path of the layer, which decides roles together with the names inside.
    """
    inner: dict[str, tuple[Tensor, Tensor]] = {}
    for path, module in narrow.named_modules():
        source = _find(wide, path) or _find(first, path)
        if source is None or not module._parameters:
            continue
        role = role_of(f"{prefix}.{path}")
        if role in ("q", "qkv"):
            inner["o"] = _heads(source, _near(wide, path), config, module, score, role == "qkv")
        if role in ("gate", "up") and "down" not in inner:
            inner["down"] = _feed_forward(source, _near(wide, path), module, score)
        rows, columns = _sets(role, dims, inner)
        _copy(module, source, rows, columns)
        if role == "down":
            inner.pop("down")


def _sets(role: str | None, dims: Tensor, inner: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Kept rows and columns for a role; norms and the like follow the residual stream."""
    if role in ("o", "down") and role in inner:
        return dims, inner[role][0]
    if role in ("q", "qkv", "k", "v") and "o" in inner:
        return inner["o"][1 if role in ("k", "v", "qkv") else 0], dims
    if role in ("gate", "up") and "down" in inner:
        return inner["down"][0], dims
    return dims, dims


def _heads(
    q: nn.Module, near: dict[str, nn.Module], config: Any, narrow: nn.Module, score: Score, fused: bool
) -> tuple[Tensor, Tensor]:
    """Kept rows of the queries, and of keys and values (of all three when they are fused)."""
    heads = config.num_attention_heads
    rows = score(q).abs().sum(1)
    if fused:
        parts = list(rows.chunk(3))
        width = Site("", narrow).shape[0] // 3
    else:
        parts = [rows, *(score(near[role]).abs().sum(1) for role in ("k", "v") if role in near)]
        width = Site("", narrow).shape[0]
    size, kept = len(parts[0]) // heads, width // heads
    groups = min(len(part) for part in parts) // size
    joint = torch.stack([part.view(groups, -1, size).sum(1) for part in parts]).log().sum(0)
    if getattr(config, "rope_parameters", None) is not None:
        half = torch.stack([_top(row, kept // 2) for row in joint.view(groups, 2, -1).sum(1)])
        chosen = torch.cat([half, half + size // 2], 1)
    else:
        chosen = torch.stack([_top(row, kept) for row in joint])
    start = torch.arange(heads, device=chosen.device)[:, None] * size
    queries = (start + chosen.repeat_interleave(heads // groups, 0)).flatten()
    if fused:
        return queries, torch.cat([queries + i * len(parts[0]) for i in range(3)])
    return queries, (start[:groups] + chosen).flatten()


def _feed_forward(
    source: nn.Module, near: dict[str, nn.Module], narrow: nn.Module, score: Score
) -> tuple[Tensor, Tensor]:
    sources = [near[role] for role in ("gate", "up") if role in near] or [source]
    joint = torch.stack([score(module).abs().sum(1) for module in sources]).log().sum(0)
    rows = _top(joint, Site("", narrow).shape[0])
    return rows, rows


def _near(layer: nn.Module, path: str) -> dict[str, nn.Module]:
    """Modules beside one, by role."""
    parent = path.rpartition(".")[0]
    around = layer.get_submodule(parent).named_children()
    return {role: module for name, module in around if (role := role_of(f"{parent}.{name}")) is not None}


def _find(layer: nn.Module, path: str) -> nn.Module | None:
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


@torch.no_grad()
def _copy(narrow: nn.Module, wide: nn.Module, rows: Tensor, columns: Tensor) -> None:
    """Copy what fits: whole tensors of equal shape, else the kept rows and columns."""
    to, source = Site("", narrow), Site("", wide)
    for leaf, target in narrow._parameters.items():
        value = wide._parameters.get(leaf)
        if target is None or value is None:
            continue
        if target.shape == value.shape:
            target.copy_(value)
        elif to.kind == "linear" and leaf == "weight":
            if to.shape == (len(rows), len(columns)):
                cut = source.weight()[rows][:, columns]
                target.copy_(cut.T if to.transposed else cut)
        elif target.dim() == 1 and len(target) == len(rows) and value.dim() == 1:
            target.copy_(value[rows])


def _top(values: Tensor, count: int) -> Tensor:
    return values.topk(count).indices.sort().values
