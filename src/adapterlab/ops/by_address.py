"""Updates of runs of tokens on a CPU: a kernel in C (`by_address.c`), compiled when it is needed.

Nothing is gathered, stacked or cast: a step with 32 adapters reads each number of theirs once, where it was loaded.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapterlab.errors import BuildError
from adapterlab.foreign.compiler import library
from adapterlab.ops.segmented import ENTRY, TYPES, Entries, Run, Runs, cut, off

SOURCE = Path(__file__).with_suffix(".c")
_PRODUCT = "QQqqqii"  # the kernel's structure of this name
_AT_ONCE = 16  # tokens of a run that one thread takes
_ALONE = 2**16  # multiplications up to which one thread is faster than several


class ByAddress:
    """The compiled kernel; see `ops.segmented.Way`."""

    name = "compiled kernel"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    long: float = 64  # as fast at small ranks, twice as fast at large ones

    def __init__(self, source: Path = SOURCE):
        """Compile it, unless that was done, and try it.

        Raises:
            BuildError: it cannot be compiled here, or does not compute what it should.
        """
        self._call: Any = library(source).adapterlab_product
        self._call.restype = None
        # Bytes are passed as the address of the first, and addresses as they are.
        self._call.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
        if why := off(self, "cpu"):
            raise BuildError(f"the compiled kernel computes something else here: {why}")

    def step(self, table: Entries, widths: Sequence[tuple[int, int]], runs: Runs) -> _Step:
        return _Step(self._call, table, widths, runs)


class _Step:
    """What the kernel is told of each module, written down when that is called first."""

    def __init__(self, call: Any, table: Entries, widths: Sequence[tuple[int, int]], runs: Runs):
        self.call, self.widths, self.total = call, widths, runs.total
        self.table = np.ascontiguousarray(table, ENTRY)
        self.pieces = [np.array(cut(one, _AT_ONCE), np.int32) for one in runs.rounds]
        self.work = [_work(self.table, widths, one) for one in runs.rounds]
        self.threads = torch.get_num_threads()
        self.told: dict[tuple[int, torch.dtype], list[bytes]] = {}

    def __call__(self, module: int, x: Tensor, y: Tensor) -> None:
        n_in, out = self.widths[module]
        fits = x.numel() == self.total * n_in and y.numel() == self.total * out and x.dtype is y.dtype
        if not (fits and x.is_cpu and y.is_cpu and y.is_contiguous()):
            raise ValueError(
                f"{self.total} tokens of {n_in} numbers are multiplied here and added to as many of {out}, one behind "
                f"the other on a CPU; received {list(x.shape)} {x.dtype} and {list(y.shape)} {y.dtype}."
            )
        told = self.told.get((module, x.dtype))
        if told is None:
            told = self.told[module, x.dtype] = self._tell(module, x.dtype)
        x = x.contiguous()
        for one in told:
            self.call(one, x.data_ptr(), y.data_ptr())

    def _tell(self, module: int, dtype: torch.dtype) -> list[bytes]:
        if dtype not in ByAddress.dtypes:
            raise ValueError(f"x is float32 or bfloat16; received {dtype}.")
        updates = self.table.ctypes.data + module * self.table.strides[0]
        shape = (*self.widths[module], TYPES[dtype])
        return [
            struct.pack(_PRODUCT, updates, p.ctypes.data, len(p), *shape, self.threads if work[module] > _ALONE else 1)
            for p, work in zip(self.pieces, self.work, strict=True)
        ]


def _work(table: Entries, widths: Sequence[tuple[int, int]], runs: Sequence[Run]) -> np.ndarray[Any, Any]:
    """Multiplications of each module `[modules]`."""
    tokens = np.zeros(table.shape[1], np.int64)
    for start, stop, number in runs:
        tokens[number] += stop - start
    work: np.ndarray[Any, Any] = (table["rank"] @ tokens) * np.array(widths).sum(1)
    return work
