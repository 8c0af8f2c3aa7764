"""Which kind a run takes: what its configuration says, within what its processes were started for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal, get_args

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from adapterlab.errors import ConfigError
from adapterlab.foreign.model import places
from adapterlab.train.parallel.alone import Alone
from adapterlab.train.parallel.placed import Placed
from adapterlab.train.parallel.replicated import Replicated
from adapterlab.train.parallel.sharded import Options, Sharded

Kind = Literal["auto", "ddp", "fsdp", "zero2", "zero3", "device_map"]
KINDS: tuple[str, ...] = get_args(Kind)
_FIRST_ALONE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_SPLIT = ("fsdp", "zero2", "zero3")
_PLAIN = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def kind_of(accelerator: Accelerator, model: nn.Module, wanted: str = "auto", *, offload: bool = False) -> Alone:
    """Make the kind of a run.

    Args:
        accelerator: of the run; it knows how many processes there are, and whether accelerate was told of FSDP.
        model: what is spread.
        wanted: one of `KINDS`; auto: as the processes were started.
        offload: of a split model, keep what is not in use in the CPU's memory.

    Raises:
        ConfigError: it does not go with how the processes were started.
    """
    started: Any = accelerator.distributed_type
    if started not in (DistributedType.NO, DistributedType.FSDP, *_PLAIN):
        raise ConfigError(
            f"Training on {started} is not supported. Start the processes plainly (adapterlab train --processes N, "
            f"torchrun, accelerate launch --multi_gpu) or with FSDP 2, and choose with parallel: ddp, "
            f"{', '.join(_SPLIT)}. What "
            "DeepSpeed's stages 2 and 3 divide, zero2 and zero3 divide here without its package."
        )
    if accelerator.num_processes == 1:
        return Placed(accelerator, places(model)) if places(model) else Alone(accelerator)
    if wanted == "device_map" or places(model):
        raise ConfigError(
            f"parallel=device_map places one model over all devices, and there are {accelerator.num_processes} "
            "processes. Start one, or set parallel to fsdp."
        )
    if wanted == "ddp" and started is DistributedType.FSDP:
        raise ConfigError(
            "parallel=ddp, and accelerate was started with FSDP. Set parallel to auto, or start it plainly."
        )
    if wanted in _SPLIT or started is DistributedType.FSDP:
        return Sharded(accelerator, Options.of(accelerator, offload, reshard=wanted != "zero2"))
    return Replicated(accelerator)


def named(accelerator: Accelerator, wanted: str) -> str:
    """Say what `auto` means, which the processes decide: fsdp where accelerate was started for it, else ddp."""
    started: Any = accelerator.distributed_type
    return wanted if wanted != "auto" else "fsdp" if started is DistributedType.FSDP else "ddp"


@contextlib.contextmanager
def loading(accelerator: Accelerator, wanted: str, device: str | None) -> Iterator[str | None]:
    """Load a model inside the context, to the device that it yields; None: the fastest there is; `auto`: over all.

    A model that is split comes to the CPU first, and from there to the devices layer by layer. Every process loads all
    weights: transformers would leave those of all but the first empty where accelerate was started for FSDP.

    Args:
        accelerator: of the run.
        wanted: one of `KINDS`.
        device: what the configuration says.
    """
    if accelerator.num_processes == 1:
        yield "auto" if wanted == "device_map" else device
        return
    splits = wanted in _SPLIT or accelerator.distributed_type is DistributedType.FSDP
    before = os.environ.get(_FIRST_ALONE)
    os.environ[_FIRST_ALONE] = "false"
    try:
        yield "cpu" if splits else device or str(accelerator.device)
    finally:
        if before is None:
            del os.environ[_FIRST_ALONE]
        else:
            os.environ[_FIRST_ALONE] = before
