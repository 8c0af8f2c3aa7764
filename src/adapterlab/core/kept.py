"""Results of trained tensors that are kept between calls outside of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kept:
    """Computes something anew only when the tensors that it is made of may have changed, or when that cannot be seen.

    Writes through `.data` go unseen until `clear`, which an adapter calls in its `train`.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[Any, Any]] = {}

    def once(self, name: str, compute: Callable[[], T], *tensors: Tensor, given: Any = None) -> T:
        """Return what was computed under a name, or compute it.

        Args:
            name: of the result.
            compute: makes it, without gradient.
            tensors: what it is made of.
            given: what else it depends on, such as a scale.
        """
        if torch.is_inference_mode_enabled() or any(t.is_inference() for t in tensors):
            return compute()  # tensors made there do not count their changes, and cannot be used outside
        key = [given, *((id(t), t.data_ptr(), t._version, t.dtype) for t in tensors)]
        if name not in self._held or self._held[name][0] != key:
            self._held[name] = (key, compute())
        made: T = self._held[name][1]
        return made

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
