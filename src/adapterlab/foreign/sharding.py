"""Tensors of which every process holds a part: telling them, gathering them, filling them.

A `DTensor` is known by what it can do, so that a program on one device never loads `torch.distributed.tensor`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adapterlab.errors import OutputError
from adapterlab.foreign.model import base_modules

Result = TypeVar("Result")


def is_sharded(model: nn.Module) -> bool:
    """Say whether a module's parameters are split among processes.

    FSDP2 marks its modules too: after a forward pass it may show whole parameters for a while.
    """
    modules = [module for _, module in base_modules(model)]  # adapters are split with what they are at
    held = (p for module in modules for p in module._parameters.values() if p is not None)
    parts = any(is_part(p) or _is_flat(p) for p in held)
    return parts or any(hasattr(m, "unshard") and hasattr(m, "reshard") for m in modules)


def is_replicated(model: nn.Module) -> bool:
    """Say whether this is a wrapper of torch that keeps copies of a model alike, and not the model."""
    return isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, detached. For a part this is collective: every process of its mesh must come here.

    Raises:
        OutputError: it is a slice of a flat parameter of FSDP1, which cannot be put together by itself.
    """
    if _is_flat(tensor):
        raise OutputError(
            f"The tensor {tuple(tensor.shape)} is this process's slice of a flat parameter of FSDP1, and saving it "
            "would lose the rest. Shard with FSDP2 instead: torch.distributed.fsdp.fully_shard, or "
            "FullyShardedDataParallelPlugin(fsdp_version=2) in accelerate."
        )
    if tensor.numel() < getattr(tensor, "ds_numel", 0):
        raise OutputError(
            "The tensors are with other processes (ZeRO-3 of DeepSpeed), and saving here would write empty ones. "
            "Gather them first (deepspeed.zero.GatheredParameters(model.parameters())), or save through Trainer with "
            "stage3_gather_16bit_weights_on_model_save."
        )
    gathered: Tensor = _at_hand(tensor).full_tensor() if is_part(tensor) else tensor
    return gathered.detach()


def _at_hand(tensor: Any) -> Any:
    """A part where processes talk: one that waits in the CPU's memory is brought to the device."""
    kind = tensor.device_mesh.device_type
    if tensor.device.type == kind:
        return tensor
    return _made(tensor.to_local().to(kind), tensor)


@contextlib.contextmanager
def gathered(model: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let these parameters of a model be whole inside the context, so that code that reads them needs no special case.

    Collective like `whole`, one tensor after another. The process that leads has them in the CPU's memory, and the
    others zeros that take none. No forward pass may run inside.
    """
    first = leads(tensors)
    wanted = {id(tensor) for tensor in tensors if is_part(tensor) or _is_flat(tensor)}
    tables: list[dict[str, Any]] = [module._parameters for module in model.modules()] if wanted else []
    slots = [(table, key, p) for table in tables for key, p in table.items() if id(p) in wanted]
    try:
        for table, key, parameter in slots:
            value = whole(parameter)
            value = value.cpu() if first else torch.zeros((), dtype=value.dtype).expand(value.shape)
            table[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        yield
    finally:
        for table, key, parameter in slots:
            table[key] = parameter


def is_elsewhere(tensor: Tensor) -> bool:
    """Say whether a tensor here is not all of itself: the rest, or all of it, is with other processes.

    ZeRO-3 of DeepSpeed leaves an empty tensor in a parameter's place.
    """
    return is_part(tensor) or _is_flat(tensor) or hasattr(tensor, "ds_numel")


def fill(into: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be split; each process keeps its part."""
    if is_part(into) and not is_part(value):
        from torch.distributed.tensor import distribute_tensor

        part: Any = into
        value = distribute_tensor(value.to(part.device, part.dtype), part.device_mesh, part.placements)
    into.copy_(value)


def local(tensor: Tensor) -> Tensor:
    """Return what of a tensor is on this process, detached, in the same memory: all of it, or its rows."""
    found: Tensor = tensor.to_local() if is_part(tensor) else tensor  # type: ignore[attr-defined]
    return found.detach()


def rows_here(tensor: Tensor) -> tuple[int, int]:
    """Return the first row of a tensor that is on this process, and the one behind the last.

    FSDP2 deals rows out in pieces of ⌈rows / processes⌉; the last processes may have none.
    """
    if not is_part(tensor):
        return 0, len(tensor)
    part: Any = tensor
    mesh = part.device_mesh
    size = math.ceil(len(part) / mesh.size())
    start = min(size * mesh.get_coordinate()[0], len(part))
    return start, start + len(part.to_local())


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole tensor that every process has, split as another one is; no communication.

    Where the other one is whole, so is the result.
    """
    if not is_part(like) or is_part(value):
        return value
    start, stop = rows_here(like)
    return laid_out_rows(value[start:stop], like)


def laid_out_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Return the tensor of which these are the rows on this process; where the other one is whole, the rows."""
    return _made(rows.to(like.device, copy=True), like) if is_part(like) else rows


def _made(rows: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made


@torch.no_grad()
def read(tensor: Tensor, index: Tensor) -> Tensor:
    """Return the values `[k]` at flat row-major positions `[k]` of a tensor that may be split; collective then."""
    if not is_part(tensor):
        return tensor.detach().reshape(-1)[index]
    places, here = _places(tensor, index)
    part: Any = tensor
    values = torch.zeros(len(index), dtype=tensor.dtype, device=places.device)
    values[here] = local(tensor).reshape(-1)[places]
    values = values.to(part.device_mesh.device_type)
    torch.distributed.all_reduce(values, group=part.device_mesh.get_group())
    return values


@torch.no_grad()
def write(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Write values `[k]` to flat row-major positions `[k]` of a tensor; each process writes into its part of it."""
    flat = local(tensor).view(-1)
    if is_part(tensor):
        index, here = _places(tensor, index)
        values = values.to(here.device)[here]
    flat[index] = values.to(flat.device, flat.dtype)


def _places(tensor: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Where positions of the whole are in this process's part, and which of them are."""
    part = local(tensor)
    width = max(1, tensor.numel() // max(1, len(tensor)))
    start = rows_here(tensor)[0] * width
    index = index.to(part.device)
    here = (index >= start) & (index < start + part.numel())
    return index[here] - start, here


def called(module: nn.Module, compute: Callable[[], Result]) -> Result:
    """Compute something as the forward pass of a module would: FSDP2's hooks make its own parameters whole for it.

    What the forward pass calls by itself (layers that are split by themselves) may be called in any way. A loss that
    reads the head's weight sees all of it, and the weight's gradient is dealt out as any other.
    """
    before = module.__dict__.get("forward")

    def forward() -> Result:
        _put_back(module, before)
        return compute()

    module.__dict__["forward"] = forward
    try:
        found: Result = module()
        return found
    finally:
        _put_back(module, before)


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def reshard(model: nn.Module) -> None:
    """Let every module of FSDP2 hold its parts alone again, where a pass without a backward pass left it whole."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()


def leads(tensors: Sequence[Tensor]) -> bool:
    """Say whether this process writes what several gathered: the first of a mesh, or one that shares nothing."""
    meshes: list[Any] = [t.device_mesh for t in tensors if is_part(t)]  # type: ignore[attr-defined]
    return not any(any(mesh.get_coordinate() or ()) for mesh in meshes)


def is_part(tensor: Any) -> bool:
    """Say whether this is one process's part of a tensor, as FSDP2 makes them."""
    return hasattr(tensor, "full_tensor")


def _is_flat(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "_fsdp_flattened", False))
