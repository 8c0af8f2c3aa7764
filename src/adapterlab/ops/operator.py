"""Fused kernels as operators of torch: compilers, tracers and checkpoint policies see one step, not its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "adapterlab"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as the operator `torch.ops.adapterlab.<name>`.

    The operator has no gradient of its own: an `autograd.Function` calls it in its forward or backward pass. Its
    results must be new tensors, no views of what it received. A call costs about 1.5 µs more than the function's.

    Args:
        schema: such as `scale(Tensor x, float factor) -> Tensor`.
        fake: takes the same arguments and returns empty tensors of the right shape, dtype and device, for
            `torch.compile` and for the simulation of memory.

    Returns:
        A decorator; the function's name becomes the operator.
    """

    def register(kernel: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register
