"""Base and update as one node: a frozen linear layer and what is added to its output.

An adapter gives its factors, or the node; whether it is computed with the module's own product is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adapterlab.core.adapter import READY, Adapter
from adapterlab.engine.resting import behind, factors_at_rest, unchanged
from adapterlab.ops.low_rank import autocasts, low_rank_linear, plus_low_rank, thin_dtype


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
    if alone and only_adds(adapter):
        asked = adapter.is_its_factors and not torch.is_grad_enabled()
        if asked and (y := without_gradient((adapter,), args[0])) is not None:
            return y
        if may_fuse(adapter, args[0]):
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


# ---------------------------------------------------------------------- without gradients


def without_gradient(live: tuple[Any, ...], x: Any) -> Tensor | None:
    """Compute a module with the updates of several adapters as one low-rank product, with factors that are kept cast.

    Args:
        live: adapters of one module that are their factors.
        x: its input.

    Returns:
        None where there is no such form; a compiler finds its own.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling() or autocasts(x):
        return None
    ready: _Ready | None = live[0].__dict__.get(READY)
    if ready is None or not ready.serves(live, x):
        ready = live[0].__dict__[READY] = _Ready(live, x)
    if ready.made_of is None:
        return None
    module: Any = live[0].site.module
    weight = module.weight.T if ready.transposed else module.weight
    return plus_low_rank(x, weight, module.bias, *ready.factors(thin_dtype(x)), ready.scale)


class _Ready:
    """The factors of a module's live adapters behind each other, cast; they serve while nothing writes to them.

    Attributes:
        made_of: what they were, or None where the module cannot be computed so.
        scale: factor of the update.
    """

    def __init__(self, live: tuple[Any, ...], x: Tensor):
        site = live[0].site
        self.live, self.dtype, self.transposed = live, x.dtype, site.transposed
        self.made_of = factors_at_rest(live) if may_fuse(live[0], x) and _has_bias_in(site.bias, x.dtype) else None
        scales = {rest.scale for rest in self.made_of or ()}
        self.alike = len(scales) == 1
        self.scale = scales.pop() if self.alike else 1.0
        self.cast: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def serves(self, live: tuple[Any, ...], x: Tensor) -> bool:
        """Say whether nothing has changed."""
        if x.dtype is not self.dtype:
            return False
        return live == self.live if self.made_of is None else unchanged(self.made_of, live)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Aᵀ `[in, r]` and Bᵀ `[r, out]` in a dtype."""
        if dtype not in self.cast:
            held = [(rest.a.detach(), rest.b.detach(), rest.scale) for rest in self.made_of or ()]
            pairs = [(a, b if self.alike else scale * b) for a, b, scale in held]
            a, b = behind(pairs) or pairs[0]
            self.cast[dtype] = a.to(dtype).T, b.to(dtype).T
        return self.cast[dtype]


def _has_bias_in(bias: Tensor | None, dtype: torch.dtype) -> bool:
    return bias is None or bias.dtype == dtype
