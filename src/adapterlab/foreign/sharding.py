"""Tensors of which every process holds a part: telling them, gathering them, filling them.

A `DTensor` is known by what it can do, so that a program on one device never loads `torch.distributed.tensor`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from adapterlab.errors import OutputError


def is_sharded(model: nn.Module) -> bool:
    """Say whether a module's parameters are split among processes.

    FSDP2 marks its modules too: after a forward pass it may show whole parameters for a while.
    """
    parts = any(_is_part(p) or _is_flat(p) for p in model.parameters())
    return parts or any(hasattr(m, "unshard") and hasattr(m, "reshard") for m in model.modules())


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
    gathered: Tensor = tensor.full_tensor() if _is_part(tensor) else tensor  # type: ignore[attr-defined]
    return gathered.detach()


@contextlib.contextmanager
def gathered(model: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let these parameters of a model be whole inside the context, so that code that reads them needs no special case.

    Collective like `whole`. No forward pass may run inside.
    """
    wanted = {id(tensor) for tensor in tensors if _is_part(tensor) or _is_flat(tensor)}
    tables: list[dict[str, Any]] = [module._parameters for module in model.modules()] if wanted else []
    slots = [(table, key, p) for table in tables for key, p in table.items() if id(p) in wanted]
    try:
        for table, key, parameter in slots:
            table[key] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
        yield
    finally:
        for table, key, parameter in slots:
            table[key] = parameter


def is_elsewhere(tensor: Tensor) -> bool:
    """Say whether a tensor here is not all of itself: the rest, or all of it, is with other processes.

    ZeRO-3 of DeepSpeed leaves an empty tensor in a parameter's place.
    """
    return _is_part(tensor) or _is_flat(tensor) or hasattr(tensor, "ds_numel")


def fill(into: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be split; each process keeps its part."""
    if _is_part(into) and not _is_part(value):
        from torch.distributed.tensor import distribute_tensor

        part: Any = into
        value = distribute_tensor(value.to(part.device, part.dtype), part.device_mesh, part.placements)
    into.copy_(value)


def leads(tensors: Sequence[Tensor]) -> bool:
    """Say whether this process writes what several gathered: the first of a mesh, or one that shares nothing."""
    meshes: list[Any] = [t.device_mesh for t in tensors if _is_part(t)]  # type: ignore[attr-defined]
    return not any(any(mesh.get_coordinate() or ()) for mesh in meshes)


def _is_part(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _is_flat(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "_fsdp_flattened", False))
