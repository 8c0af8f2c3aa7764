"""Every name of torch that we use without a promise behind it; nobody else imports one (tests/core/test_private.py).

| name | what for | what replaces it when it goes |
|---|---|---|
| `FakeTensor`, `FakeTensorMode`, `unset_fake_temporarily` | plans run a step on tensors without contents | the meta device, with our own count of what devices would hold |
| `DataDependentOutputException`, `DynamicOutputShapeException` | a plan says which operator needs numbers | catching RuntimeError, with a vaguer message |
| `TorchDispatchMode` | counting operators and keeping products | documented in the notes on extending torch, only its place is private |
| `_disable_current_modes` | a small trial with numbers in the middle of a simulation | making the trials before it starts |
| `has_tile_products` | which forward pass of attention is faster | the processor's flags, or timing both once |
| `tree_iter` | tensors among an operator's arguments | ten lines of recursion |
| `DispatchKey`, `_SetExcludeDispatchKeyGuard` | recomputation leaves views to autograd | none: `recompute: cheap` would fall back to `full` |
| `BELOW_AUTOGRAD`, `without` | kernels of our own in the place of torch's, for a while | a dispatch mode, which costs every operator a call into Python |
| `StorageWeakRef` | two tensors share memory, without keeping it alive | `untyped_storage().data_ptr()`, compared while both live |
| `graph_task_id` | whether the backward pass runs now | a flag set by a hook on the loss |
| `is_followed` | a kernel's writes are invisible to modes, transforms and tracers | torch's products in their place, always |
| `is_composed` | whether an operator is a composition of others | a list of such operators |
| `as_plain_tensors` | a weight with a copy is a weight to every other function | `torch.Tensor.__torch_function__`, several times slower |
| `reordered`, `reordered_linear` | products with weights in the order that oneDNN reads | `F.linear` on the plain weight |
| `softmax_backward` | the gradient of the attention kernel | p * (dp - (dp * p).sum(-1)), one more copy |
"""  # noqa: E501

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass as as_plain_tensors
from torch._C import DispatchKey, _SetExcludeDispatchKeyGuard
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

BELOW_AUTOGRAD = "BackendSelect"  # the key that every call passes between autograd and the device's kernel

__all__ = [
    "BELOW_AUTOGRAD",
    "DataDependentOutputException", "DispatchKey", "DynamicOutputShapeException", "FakeTensor", "FakeTensorMode",
    "StorageWeakRef", "TorchDispatchMode", "_SetExcludeDispatchKeyGuard", "_disable_current_modes",
    "as_plain_tensors", "graph_task_id", "has_tile_products", "is_composed", "is_followed", "reordered",
    "reordered_linear", "softmax_backward", "tree_iter", "unset_fake_temporarily", "without",
]  # fmt: skip


def graph_task_id() -> int:
    """Number of the backward pass that runs on this thread, -1 when none does."""
    return torch._C._current_graph_task_id()


def is_followed() -> bool:
    """Say whether something follows what torch computes here, to which what a kernel of ours writes is invisible.

    A mode that sees operators, a transform such as `vmap`, a tracer, or derivatives that are taken forward.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def without(keys: Any, key: str) -> Any:
    """The dispatch keys of a call without one of them, for its `redispatch`."""
    return keys.remove(getattr(DispatchKey, key))


@functools.cache
def is_composed(operator: Any) -> bool:
    """Say whether an operator of torch consists of others."""
    key = DispatchKey.CompositeImplicitAutograd
    return operator.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key)


def has_tile_products() -> bool:
    """Say whether the processor multiplies tiles of bfloat16 by instructions of their own (Intel AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def softmax_backward(dp: Tensor, p: Tensor, out: Tensor) -> Tensor:
    """The gradient of a softmax over the last dimension, written into `out`; `dp` is that of its result `p`."""
    return torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=out)


def reordered(weight: Tensor, rows: int) -> Tensor:
    """Copy a weight `[out, in]` in the order in which oneDNN reads it for products with about so many rows."""
    copied: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return copied


def reordered_linear(x: Tensor, copied: Tensor, bias: Tensor | None) -> Tensor:
    """What `F.linear` computes, with a weight in that order."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, copied, bias, "none", [], "")
    return y
