"""Base and update as one node: a frozen linear layer and what is added to its output.

An adapter gives its factors, or the node; whether it is computed with the module's own product is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.ops.low_rank import autocasts, low_rank_linear


class Base:
    """The module's own computation, the innermost `run`."""

    def __init__(self, forward: Callable[..., Any], module: nn.Module):
        self.forward = forward
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(self.module, *args, **kwargs)


def computed(adapter: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compute an adapter around the rest of the computation: in one node with it, or by its own `around`."""
    alone = isinstance(run, Base) and len(args) == 1 and not kwargs
    if alone and only_adds(adapter) and may_fuse(adapter, args[0]):
        found = adapter.factors() if adapter.is_its_factors else None
        y = adapter.whole(args[0]) if found is None else _one_node(adapter, args[0], *found)
        if y is not None:
            return y
    return adapter.around(run, *args, **kwargs)


def may_fuse(adapter: Adapter, x: Any) -> bool:
    """Say whether the product of the frozen weight with x may be computed in the module's place."""
    floats = isinstance(x, Tensor) and x.is_floating_point()
    return floats and adapter.site.at_hand(x.dtype) and not autocasts(x)


def why_apart(adapter: Any) -> str:
    """Return why training does not compute an adapter in one node with the module's own product, or ""."""
    fuses = only_adds(adapter) and (_has_factors(adapter) or type(adapter).whole is not Adapter.whole)
    return str(adapter.site.why_apart() if fuses else adapter.slow_because())


def only_adds(adapter: Any) -> bool:
    """Say whether an adapter adds to what the module returns and does nothing else around its call."""
    return bool(adapter.additive) and "around" not in adapter.__dict__


def _has_factors(adapter: Any) -> bool:
    return adapter.is_its_factors and adapter.factors() is not None


def _one_node(adapter: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    weight, *again = adapter.site.frozen_weight(x.dtype)
    bias, shift = adapter.site.bias, adapter.added_bias
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return low_rank_linear(x, weight, bias, a, b, adapter.scale, adapter.p if adapter.training else 0.0, *again)
