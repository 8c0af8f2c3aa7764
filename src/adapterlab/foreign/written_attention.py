"""Attention that a model writes out in its own forward, past the attention interface of transformers.

Here is the same computation with a call for its core, which adapters can stand around.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Inside = Callable[..., Any]  # (core, q, k, v, mask, ...) -> what the core returns
LINEAR = "linear_bias"  # argument of a core whose position bias is linear in the position of a key

# What a forward with linear biases (ALiBi) and one projection for queries, keys and values consists of.
_LINEAR_PARTS = (
    "self._reshape(", "self.query_key_value(", "layer_past.update(", "alibi.baddbmm(", "self.inv_norm_factor",
    "self.attention_dropout(", "self.dense(", "dropout_add(",
)  # fmt: skip


@functools.cache
def written_out(cls: Any) -> Callable[..., Any] | None:
    """Return a class's forward in a form that takes (module, inside, ...), or None: it is not written out as known."""
    try:
        source = inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return None
    return _with_linear_biases if all(part in source for part in _LINEAR_PARTS) else None


def _with_linear_biases(
    module: Any,
    inside: Inside,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention to the bit as the module computes it; `alibi` `[batch · heads, 1, keys]`."""
    q, k, v = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        k, v = layer_past.update(k, v, module.layer_idx)
    bias = alibi.view(len(q), module.num_heads, 1, -1)
    core = functools.partial(_linear_core, module)
    given: dict[str, Any] = {"scaling": module.inv_norm_factor, "position_bias": bias, LINEAR: True}
    context, weights = inside(core, q, k, v, attention_mask, **given)
    y = module.dense(context.flatten(2))
    return residual + F.dropout(y, module.hidden_dropout, module.training), weights


def _linear_core(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    position_bias: Tensor,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return `[batch, queries, heads, width]` and the weights."""
    flat_q, flat_k, flat_v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    scores = position_bias.flatten(0, 1).baddbmm(flat_q, flat_k.mT, beta=module.beta, alpha=scaling)
    scores = scores.view(*q.shape[:3], -1)
    scores = scores if mask is None else scores + mask
    weights = module.attention_dropout(F.softmax(scores, -1, dtype=torch.float32).to(q.dtype))
    context = torch.bmm(weights.flatten(0, 1), flat_v)
    return context.view(*q.shape[:3], -1).transpose(1, 2), weights


def slopes(heads: int, device: torch.device) -> Tensor:
    """The slope of each head's linear bias `[heads]`.

    A geometric series from 2^(−8 / n) on for the n heads up to a power of two, and every second number of the next
    finer series for the others ("Train Short, Test Long", arXiv 2108.12409).
    """
    whole = 2 ** math.floor(math.log2(heads))
    found = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    found += [2 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return torch.tensor(found, device=device)
