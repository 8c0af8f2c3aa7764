"""What this machine's processor is good at."""

from __future__ import annotations

import contextlib
import functools
import platform
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from adapterlab.foreign.private_torch import _disable_current_modes

_SIZES = (128, 512, 512)  # of a product: tokens, out, in
_SLOW = 3.0  # ratio of the times from which half precision costs more than it saves


@functools.cache
def facts() -> Mapping[str, str]:
    """What the system says of the first processor; nothing, where it does not say it as Linux does."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    return found


def named() -> str:
    """Name the processor, and the instructions that torch computes with: `AMD EPYC, AVX512`."""
    name = facts().get("model name") or platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def accelerated() -> bool:
    """Say whether there is a GPU of any kind."""
    return torch.cuda.is_available() or torch.backends.mps.is_available()


@functools.cache
def slow_in(dtype: torch.dtype) -> bool:
    """Say whether the processor takes many times as long for products in a dtype as in float32.

    Those without instructions for half precision (most laptops) compute them in software. It is tried once, in
    milliseconds.
    """
    with _disable_current_modes():
        return _seconds(dtype) > _SLOW * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """Time of the products of a linear layer, forward and backward, that one thread computes: the best of a few.

    The thread's own time, so that it says nothing of who else uses the machine.
    """
    tokens, out, in_ = _SIZES
    x, weight = torch.ones(tokens, in_, dtype=dtype), torch.ones(out, in_, dtype=dtype)
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):  # the first makes the kernels
            began = time.thread_time()
            (x @ weight.T) @ weight
            times.append(time.thread_time() - began)
    finally:
        torch.set_num_threads(threads)
    return min(times[1:])
