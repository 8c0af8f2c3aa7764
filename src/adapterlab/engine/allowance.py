"""A bound on the tensors that are made while an adapter is put on: sizes come from files, and files may be wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from adapterlab.errors import AttachError

_MAKERS = frozenset(
    (
        torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm,
        torch.eye, torch.arange, torch.linspace, torch.tril_indices, torch.triu_indices, torch.empty_strided,
        Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full,
    )
)  # fmt: skip
_ONLY_REAL = ("device", "generator", "pin_memory", "out")


class Allowance(TorchFunctionMode):
    """Inside the context no more numbers are made than are allowed; what is too much is refused before it exists.

    Args:
        numbers: that may be made altogether.
    """

    def __init__(self, numbers: int):
        super().__init__()
        self.numbers = self.left = numbers

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MAKERS:
            self.left -= self._asked(func, args, kwargs)
            if self.left < 0:
                raise AttachError(
                    f"its settings ask for tensors of more than {self.numbers:,} numbers, which neither the tensors "
                    "in its file nor the base model account for. A size in its configuration is wrong: copy the whole "
                    "folder again."
                )
        return func(*args, **kwargs)

    def _asked(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> int:
        plain = {key: value for key, value in kwargs.items() if key not in _ONLY_REAL}
        try:
            return int(func(*args, **plain, device="meta").numel())
        except (
            RuntimeError,
            OverflowError,
            TypeError,
            MemoryError,
        ) as error:  # more than can be counted, or no size at all
            return self.left + 1 if "overflow" in str(error).lower() else 0
