"""States of all random number generators, as plain values that a safe loader accepts."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def state() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(saved: dict[str, Any]) -> None:
    """Put the generators back into a state."""
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(saved["torch"])
    if saved["cuda"]:
        torch.cuda.set_rng_state_all(saved["cuda"][: torch.cuda.device_count()])


class Stream:
    """The random numbers of one of several runs in a process: what the others draw does not move them.

    Attributes:
        generator: where torch's numbers of the CPU stand; a pass over the tokens of several runs draws from it.
    """

    def __init__(self) -> None:
        self._state = state()
        self.generator = torch.Generator()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Let all generators of the process be those of this run inside the context."""
        before = state()
        restore({**self._state, "torch": self.generator.get_state()})
        try:
            yield
        finally:
            self._state = state()
            self.generator.set_state(self._state["torch"])
            restore(before)
