"""Memory of a run: what it takes beyond the loaded model, and at its peak."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch

from adapterlab.foreign.process_memory import resident


@dataclass
class Meter:
    """Measures memory in bytes; resident memory of the process, and the allocator's count on a GPU.

    Attributes:
        device: where the model is.
        loaded: resident memory when the meter was made, after loading the model.
        samples: resident memory after each step.
    """

    device: torch.device
    loaded: int = field(default_factory=resident)
    samples: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def sample(self) -> int:
        """Take a sample and return the memory to show: the GPU's if there is one."""
        self.samples.append(resident())
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else self.samples[-1]

    def report(self) -> dict[str, int | None]:
        """Return peak, peak beyond the loaded model, and mean over the steps."""
        peak = max(peak_resident(), *self.samples, 0)  # the kernel counts in batches and may lag behind a sample
        return {
            "loaded": self.loaded,
            "peak": peak,
            "peak_beyond_loaded": peak - self.loaded,
            "mean": round(sum(self.samples) / len(self.samples)) if self.samples else None,
            "gpu_peak": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
        }


def peak_resident() -> int:
    """Largest resident memory of this process since it started."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
