"""The processes of one run: how they were started, and what must be the same on all of them.

A launcher (`accelerate launch`, `torchrun`, `adapterlab train --processes`) gives each process its number, the rank, in
the environment. What differs between ranks is found before the first step, by one exchange for each kind of facts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, str_to_bool

from adapterlab.errors import ConfigError

LOGS = "logs"  # in the run's folder: a file for each rank that does not print on the terminal
_LONG = 60  # characters of a value in a message


def launched() -> int:
    """How many processes a launcher started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def launched_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() > 1 else 1


def rank() -> int:
    """The number of this process among those of its run."""
    return int(os.environ.get("RANK", 0)) if launched() > 1 else 0


def log_of(number: int) -> str:
    """Name the file in the run's folder that holds what a rank printed."""
    return f"{LOGS}/rank_{number}.log"


def check_start(device: str | None) -> None:
    """Check how the processes of this run were started, before they look for each other.

    Raises:
        ConfigError: several were asked for and one was started, or they do not fit the device.
    """
    if _one_of_several():
        raise ConfigError(
            "accelerate launch --cpu starts one process, whatever --num_processes says (several only through MPI, with "
            "--mpirun_hostfile). Use: adapterlab train ... --processes N, or "
            "torchrun --nproc-per-node N -m adapterlab train ..."
        )
    if launched() > 1:
        check_devices(device, launched_here())


def _one_of_several() -> bool:
    """Whether accelerate was asked for several processes on CPUs: it sets an address for them, and starts one."""
    asked = str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "no")) and "MASTER_ADDR" in os.environ
    return bool(asked) and not any(
        name.endswith(("LOCAL_RANK", "LOCALRANKID", "COMM_WORLD_RANK")) for name in os.environ
    )


def check_devices(device: str | None, processes: int) -> None:
    """Check that several processes of one machine have devices.

    Args:
        device: of the configuration.
        processes: on this machine.

    Raises:
        ConfigError: one device is named for all of them, or there are more of them than GPUs.
    """
    if device is not None and ":" in device:
        raise ConfigError(
            f"device={device!r} is one device, and {processes} processes need one each. Leave device out, or choose "
            "the GPUs with CUDA_VISIBLE_DEVICES."
        )
    gpus = torch.cuda.device_count()
    if device != "cpu" and 0 < gpus < processes:
        raise ConfigError(
            f"{processes} processes on this machine do not fit its {gpus} GPU(s): each needs one of its own. Start at "
            f"most {gpus} here, or set device=cpu."
        )


def on_cpu(device: str | None) -> bool:
    """Say whether a run computes on CPUs; several processes have to be told, one finds out."""
    return device == "cpu" or (launched() > 1 and not torch.accelerator.is_available())


def check_joined(accelerator: Accelerator) -> None:
    """Check that the processes which were started found each other.

    Raises:
        ConfigError: they did not, and each would train by itself into the same folder.
    """
    if (started := launched()) != accelerator.num_processes:
        raise ConfigError(
            f"The launcher started {started} processes, and accelerate joins {accelerator.num_processes} on "
            f"{accelerator.device}. Several processes train on CPUs (device=cpu) or on GPUs with a backend of "
            "torch.distributed; start one process otherwise."
        )


def check_fits(processes: int, rows: int) -> None:
    """Check that every process of a run has something to do.

    Raises:
        ConfigError: there are more processes than rows.
    """
    if processes > rows:
        raise ConfigError(
            f"{processes} processes do not fit {rows} rows to train on: some would have none of their own. Start at "
            f"most {rows}."
        )


def agreed(accelerator: Accelerator, facts: Mapping[str, Any]) -> None:
    """Check that all processes of a run have the same facts. Call it on each of them.

    Args:
        accelerator: of the run.
        facts: plain values by their names.

    Raises:
        ConfigError: they differ; raised on every process, with the names of what differs.
    """
    if accelerator.num_processes == 1:
        return
    if differing := differences(gather_object([dict(facts)])):
        raise ConfigError(
            "The processes of this run differ in what must be the same for all:\n" + "\n".join(differing) + "\nStart "
            "each with the same command and settings, the same versions of all packages, and the same files."
        )


def obeyed(accelerator: Accelerator, refusal: ConfigError | None) -> None:
    """Let every process of a run end with what the first one refuses, or go on. Call it on each of them.

    Args:
        accelerator: of the run.
        refusal: of the first process; None: nothing is refused.

    Raises:
        ConfigError: the refusal, on every process.
    """
    if accelerator.num_processes > 1:
        told = next(filter(None, gather_object([str(refusal) if refusal is not None else ""])), "")
        refusal = refusal or (ConfigError(told) if told else None)
    if refusal is not None:
        raise refusal


def differences(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say in which facts ranks differ, and which has what.

    Args:
        every: the facts of each rank.
    """
    lines = []
    for key in dict.fromkeys(key for facts in every for key in facts):
        ranks: dict[str, list[int]] = {}
        for number, facts in enumerate(every):
            ranks.setdefault(_short(facts.get(key)), []).append(number)
        if len(ranks) > 1:
            lines.append(f"  {key}: " + "; ".join(f"{value} on rank {_listed(who)}" for value, who in ranks.items()))
    return lines


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[: _LONG - 3]}..."


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
