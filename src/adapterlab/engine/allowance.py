"""A bound on the tensors that are made while an adapter is put on: sizes come from files, and files may be wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from adapterlab.errors import AttachError
from adapterlab.foreign.private_torch import TorchDispatchMode

_ATEN = torch.ops.aten
_MAKERS = frozenset(
    (
        _ATEN.empty, _ATEN.zeros, _ATEN.ones, _ATEN.full, _ATEN.rand, _ATEN.randn, _ATEN.randint, _ATEN.randperm,
        _ATEN.eye, _ATEN.arange, _ATEN.linspace, _ATEN.tril_indices, _ATEN.triu_indices, _ATEN.empty_strided,
        _ATEN.new_empty, _ATEN.new_zeros, _ATEN.new_ones, _ATEN.new_full,
    )
)  # fmt: skip
# Those whose first argument is their size; of the others, one without contents is made.
_SIZED = frozenset((_ATEN.empty.memory_format, _ATEN.zeros.default, _ATEN.ones.default, _ATEN.randn.default))
_ONLY_REAL = ("device", "generator", "pin_memory", "out")
_UNCOUNTED = (RuntimeError, OverflowError, TypeError)


class Allowance(TorchDispatchMode):
    """Inside the context no more numbers are made than are allowed; what is too much is refused before it exists.

    Args:
        numbers: that may be made altogether.
    """

    def __init__(self, numbers: int):
        super().__init__()
        self.numbers = self.left = numbers

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, _UNCOUNTED) and "overflow" in str(error).lower():  # more than torch can count
            raise self._refused() from error

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in _MAKERS:
            self.left -= self._asked(func, args, kwargs)
            if self.left < 0:
                raise self._refused()
        return func(*args, **kwargs)

    def _asked(self, func: Any, args: Any, kwargs: dict[str, Any]) -> int:
        if func in _SIZED:
            return math.prod(args[0])
        plain = {key: value for key, value in kwargs.items() if key not in _ONLY_REAL}
        try:
            return int(func(*args, **plain, device="meta").numel())
        except (*_UNCOUNTED, MemoryError) as error:  # more than can be counted, or no size at all
            return self.left + 1 if "overflow" in str(error).lower() else 0

    def _refused(self) -> AttachError:
        return AttachError(
            f"its settings ask for tensors of more than {self.numbers:,} numbers, which neither the tensors in its "
            "file nor the base model account for. A size in its configuration is wrong: copy the whole folder again."
        )
