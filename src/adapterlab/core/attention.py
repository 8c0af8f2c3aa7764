"""The bridge into the attention core of `transformers`: adapters that see queries, keys and values.

The attention functions that models look up by name are replaced, once for a process, by dispatchers. A dispatcher
finds adapters through the attention module it is given, never through a closure: a function registered for one model
must not serve another model's adapters. For modules without adapters it costs one dictionary look-up.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adapterlab.core.site import plain_class
from adapterlab.core.wrapping import ADAPTERS, through
from adapterlab.errors import AttachError

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"


@functools.cache
def uses_interface(cls: Any) -> bool:
    """Say whether modules of this class compute attention through the interface of `transformers`."""
    try:
        return f"{_INTERFACE}.get_interface(" in inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False


def bridge(module: nn.Module) -> None:
    """Make the attention function that a module will look up consult its adapters.

    Raises:
        AttachError: the module does not compute attention through the interface.
    """
    cls = plain_class(module)
    if not uses_interface(cls):
        raise AttachError(
            f"{cls.__name__} does not compute attention through the attention interface of transformers, so nothing "
            "can be attached inside it. Choose a method that wraps modules (low-rank updates, bottleneck adapters, "
            "soft prompts at the input), or a model class that uses the interface."
        )
    modeling = sys.modules[cls.__module__]
    interface = getattr(modeling, _INTERFACE)
    name = getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"
    mapping = interface._local_mapping if name in interface._local_mapping else interface._global_mapping
    if not isinstance(mapping.get(name), _Dispatcher):
        mapping[name] = _Dispatcher(mapping.get(name))


class _Dispatcher:
    """An attention function that passes the original through the adapters of the module it is called for."""

    def __init__(self, original: Callable[..., Any] | None):
        self.original = original

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # "eager" is not one function: every modelling file brings its own.
        original = self.original or getattr(sys.modules[plain_class(module).__module__], _EAGER)
        run = functools.partial(original, module)
        if ADAPTERS not in module._modules:
            return run(*args, **kwargs)
        return through("attention", module, run, *args, **kwargs)


def prepend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    prefix_k: Tensor,
    prefix_v: Tensor,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """Put keys and values in front of the real ones, visible to every query.

    Without a mask, causality is implied by a flag that assumes as many keys as queries, so the causal mask is built
    before the keys are widened.

    Args:
        module: the attention module.
        q: `[batch, heads, queries, head_dim]`.
        k: `[batch, kv_heads, keys, head_dim]`, heads not yet repeated.
        v: likewise.
        mask: `[batch or 1, heads or 1, queries, keys]`, boolean (true = visible) or additive, or None.
        prefix_k: `[batch or 1, kv_heads, prefix, head_dim]`.
        prefix_v: likewise.
        kwargs: of the attention call; a `position_bias` gets zero columns.

    Returns:
        (keys, values, mask, kwargs) with `prefix` more columns.
    """
    count = prefix_k.shape[2]
    if mask is None and q.shape[2] > 1 and _is_causal(module, kwargs):
        size = (q.shape[2], k.shape[2])
        mask = torch.ones(size, dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])[None, None]
        kwargs = {**kwargs, "is_causal": False} if "is_causal" in kwargs else kwargs
    if mask is not None:
        visible = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
        mask = torch.cat([visible((*mask.shape[:-1], count)), mask[..., : k.shape[2]]], -1)
    mask = mask if mask is None else understood(module, mask, q.dtype)
    bias = kwargs.get("position_bias")
    if bias is not None:
        kwargs = {**kwargs, "position_bias": torch.cat([bias.new_zeros(*bias.shape[:-1], count), bias], -1)}
    k = torch.cat([prefix_k.expand(len(k), -1, -1, -1).to(k.dtype), k], 2)
    v = torch.cat([prefix_v.expand(len(v), -1, -1, -1).to(v.dtype), v], 2)
    return k, v, mask, kwargs


def understood(module: nn.Module, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask in the form that the module's attention function takes: the eager ones add their mask."""
    if mask.dtype != torch.bool or _implementation(module) != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(given if given is not None else getattr(module, "is_causal", True))


def _implementation(module: nn.Module) -> str:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"
