"""Base and update as one node: a frozen linear layer and the two factors beside it.

An adapter gives its factors; whether they are computed together with the module's own product is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from adapterlab.core.adapter import Adapter, Delta
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
    if alone and _gives_factors(adapter) and may_fuse(adapter, args[0]):
        found = adapter.factors()
        if found is not None:
            return _one_node(adapter, args[0], *found)
    return adapter.around(run, *args, **kwargs)


def may_fuse(adapter: Adapter, x: Any) -> bool:
    """Say whether the product of the frozen weight with x may be computed in the module's place."""
    floats = isinstance(x, Tensor) and x.is_floating_point()
    return floats and adapter.site.at_hand(x.dtype) and not autocasts(x)


def why_apart(adapter: Any) -> str:
    """Return why training does not compute an adapter in one node with the module's own product, or ""."""
    fuses = _gives_factors(adapter) and adapter.factors() is not None
    return str(adapter.site.why_apart() if fuses else adapter.slow_because())


def _gives_factors(adapter: Any) -> bool:
    """Say whether an adapter is its factors and nothing else, so that its own methods need not be called."""
    return isinstance(adapter, Delta) and adapter.is_its_factors and "around" not in adapter.__dict__


def _one_node(adapter: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    weight, *again = adapter.site.frozen_weight(x.dtype)
    bias, shift = adapter.site.bias, adapter.added_bias
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return low_rank_linear(x, weight, bias, a, b, adapter.scale, adapter.p if adapter.training else 0.0, *again)
