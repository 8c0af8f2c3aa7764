"""What a plan is made for: kind of device, its memory, its speed."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace

from adapterlab.errors import ConfigError, nearest

GIB = 2**30
SHARE = 0.4  # of the peak speed that training usually reaches; used for speeds from the table alone
# name: memory in GiB, peak of dense products in bf16 (fp16 where there is no bf16), in 10^12 operations a second
KNOWN: dict[str, tuple[float, float]] = {
    "t4": (15, 65), "v100-16gb": (16, 112), "v100-32gb": (32, 112), "p100": (16, 19), "a10": (24, 125),
    "a10g": (24, 70), "l4": (24, 121), "l40s": (48, 362), "a40": (48, 150), "a6000": (48, 155), "a100-40gb": (40, 312),
    "a100-80gb": (80, 312), "h100": (80, 989), "h200": (141, 989), "b200": (180, 2250), "rtx3060": (12, 51),
    "rtx3090": (24, 71), "rtx4070": (12, 58), "rtx4080": (16, 97), "rtx4090": (24, 165), "rtx5090": (32, 210),
}  # fmt: skip
_CONTEXT = int(0.55 * GIB)  # what a CUDA process takes before the first tensor: context and libraries' workspaces
_FORM = "Write cpu, cpu:32GB, cuda, cuda:24GB, mps:16GB, or the name of a GPU"


@dataclass(frozen=True)
class Device:
    """A device to plan for.

    Attributes:
        kind: cpu, cuda or mps.
        memory: bytes that a training process may take; None when it is not known.
        speed: floating-point operations a second that training reaches; None when it is not known.
        name: as given.
        count: devices that it stands for, whose memory is added up: a model's layers are placed over all of them.
        spills: what has no room on them waits in the CPU's memory.
        sharers: processes that share its memory, each with an equal part.
    """

    kind: str
    memory: int | None = None
    speed: float | None = None
    name: str = "cpu"
    count: int = 1
    spills: bool = False
    sharers: int = 1

    def __str__(self) -> str:
        several = f"{self.count} x {self.name}" if self.count > 1 else self.name
        return f"{several} (for each of {self.sharers} processes)" if self.sharers > 1 else several

    @property
    def context(self) -> int:
        """Bytes that the device's memory loses before the first tensor."""
        return self.count * _CONTEXT if self.kind == "cuda" else 0

    def times(self, count: int) -> Device:
        """Return so many like this one as one that has the memory of all; layers on them compute one after another."""
        return replace(self, memory=None if self.memory is None else count * self.memory, count=count)

    @property
    def one(self) -> Device:
        """One of the devices that it stands for."""
        return replace(self, memory=None if self.memory is None else self.memory // self.count, count=1)

    def shared(self, processes: int) -> Device:
        """Return what each of so many processes has of it."""
        memory = None if self.memory is None else self.memory // processes
        return replace(self, memory=memory, sharers=processes)

    @classmethod
    def parse(cls, text: str | Device | None, speed: float | None = None) -> Device:
        """Read a device.

        Args:
            text: `cpu`, `cuda:24GB` (sizes count 2^30 bytes a GB), a GPU's name such as `rtx4090`; None is the fastest
                one there is.
            speed: operations a second, where it is known better.

        Raises:
            ConfigError: it is unknown, or has no size and is not there.
        """
        found = text if isinstance(text, Device) else _parse(str(text) if text is not None else _present())
        return replace(found, speed=speed) if speed is not None else found

    @classmethod
    def everything(cls) -> Device:
        """Return all GPUs of this machine as one device, as a model is placed over them; without any, the CPU."""
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        memory = [_there("cuda", i, f"cuda:{i}") or 0 for i in range(count)]
        return cls("cuda", sum(memory), name="cuda", count=count, spills=True) if count else cls.parse("cpu")

    def measured(self) -> Device:
        """Return the device with the speed of a short product on it, if it is there."""
        import torch

        there = self.kind == "cpu" or (self.kind == "cuda" and torch.cuda.is_available())
        return replace(self, speed=_measure(self.kind)) if there and self.speed is None else self


def _present() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _parse(text: str) -> Device:
    name = text.strip().lower().replace(" ", "").removeprefix("nvidia").removeprefix("geforce")
    if name in KNOWN:
        memory, peak = KNOWN[name]
        return Device("cuda", int(memory * GIB), SHARE * peak * 1e12, text)
    kind, _, size = name.partition(":")
    if kind not in ("cpu", "cuda", "mps"):
        choices = ["cpu", "cpu:32GB", "cuda:24GB", "mps:16GB", *KNOWN]
        raise ConfigError(f"device={text!r} is unknown. {nearest(name, choices)} {_FORM}.")
    if size and not size.isdigit():
        return Device(kind, _bytes(size, text), None, text)
    return Device(kind, _there(kind, int(size or 0), text), None, text)


def _bytes(size: str, text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(t|g|m)i?b?", size)
    value = float(match[1]) if match else 0.0
    if not match or not value:
        raise ConfigError(f"device={text!r} has the size {size!r}, which is none. {_FORM}; sizes are like 24GB, 512MB.")
    return int(value * {"t": 2**40, "g": GIB, "m": 2**20}[match[2]])


def _there(kind: str, index: int, text: str) -> int | None:
    """Memory of a device of this machine."""
    import torch

    if kind == "cpu":
        import psutil

        return int(psutil.virtual_memory().total)
    if kind == "cuda" and torch.cuda.is_available() and index < torch.cuda.device_count():
        return int(torch.cuda.get_device_properties(index).total_memory)
    raise ConfigError(
        f"device={text!r} is not on this machine, so its memory is not known. Give it, as in {kind}:24GB."
    )


def _measure(kind: str) -> float:
    """Operations a second of a square product in the dtype that training on this device uses most."""
    import torch

    size, dtype = (1024, torch.float32) if kind == "cpu" else (8192, torch.bfloat16)
    a = torch.ones(size, size, dtype=dtype, device=kind)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        (a @ a).view(-1)[0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best * (SHARE * 1.5 if kind == "cuda" else 0.7)  # a training step does more than products
