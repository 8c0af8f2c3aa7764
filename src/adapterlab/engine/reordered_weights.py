"""Copies of frozen weights in the order in which the processor reads them, for products with few rows.

A step of a server multiplies few tokens by every weight of the model, so that reading the weight is most of the work.
oneDNN reads one that lies in blocks; given a plain one, torch has other kernels, which on many processors take longer.
So weights get a second copy, in blocks, where a trial says that this is faster. All else sees the plain weight, and so
does a product after somebody has written to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.site import is_plain_linear
from adapterlab.engine.float_products import fast_products
from adapterlab.foreign.model import plain_class
from adapterlab.foreign.private_torch import as_plain_tensors, reordered, reordered_linear
from adapterlab.foreign.quantized import is_plain

_ROWS = 16  # of a trial
_TRIED, _TIMES = 3, 4  # weights of one shape, so that none lies in a cache; and how often
_GAIN = 0.1  # of the time, from which a copy is worth its memory
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest number


class Reordered(nn.Parameter):
    """A weight `[out, in]` with a copy of itself, which `F.linear` reads.

    Attributes:
        copied: the copy.
        state: of the weight when it was copied.
    """

    copied: Tensor
    state: tuple[int, int]

    @classmethod
    def of(cls, weight: nn.Parameter, copied: Tensor) -> Self:
        """Give a weight its copy; it stays the same object."""
        state = _state(weight)
        weight.__class__ = cls
        assert isinstance(weight, cls)
        weight.copied, weight.state = copied, state
        return weight

    def forget(self) -> None:
        """Be a weight as any other."""
        del self.copied, self.state
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with as_plain_tensors():
            if func is F.linear and not kwargs and _reads_copy(*args[:2]):
                return reordered_linear(args[0], args[1].copied, args[2] if len(args) > 2 else None)
            return func(*args, **(kwargs or {}))


class ReorderedWeights:
    """The copies that the weights of a model have, until `close`.

    Attributes:
        bytes: that they take.
    """

    def __init__(self, model: nn.Module, budget: int):
        """Copy what gains most, as far as there is room.

        Args:
            model: whose linear layers are called without gradients from now on.
            budget: in bytes.
        """
        self._held: list[Reordered] = []
        self.bytes = 0
        kinds: dict[tuple[torch.Size, torch.dtype], list[nn.Parameter]] = {}
        for weight in candidates(model) if budget else ():
            if weight.device.type == "cpu" and not weight.is_inference():  # those count no changes
                kinds.setdefault((weight.shape, weight.dtype), []).append(weight)
        with fast_products(model):
            gains = [(_gain(weights[:_TRIED]) / _size(weights[0]), weights) for weights in kinds.values()]
        for gain, weights in sorted(gains, key=lambda found: found[0], reverse=True):
            for weight in weights if gain > 0 else ():
                if self.bytes + _size(weight) <= budget:
                    self._held.append(Reordered.of(weight, reordered(weight.detach(), _ROWS)))
                    self.bytes += _size(weight)

    def close(self) -> None:
        """Drop the copies."""
        for weight in self._held:
            weight.forget()
        self._held.clear()
        self.bytes = 0


def candidates(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that might have copies, each once."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        cls = plain_class(module)
        weight = module._parameters.get("weight") if issubclass(cls, nn.Linear) and is_plain_linear(cls) else None
        if weight is not None and weight.dtype in _TOLERANCE and is_plain(weight):
            found[id(weight)] = weight
    return list(found.values())


def most_bytes(model: nn.Module, budget: int) -> int:
    """Return what copies take at most."""
    return min(budget, sum(map(_size, candidates(model))))


@torch.no_grad()
def _gain(weights: Sequence[nn.Parameter]) -> float:
    """Seconds that a product with one of these weights of one shape is faster with a copy; 0 where it is no use."""
    first = weights[0]
    x = torch.linspace(-1, 1, _ROWS * first.shape[1], dtype=first.dtype).view(_ROWS, -1)
    try:
        copies = [reordered(weight.detach(), _ROWS) for weight in weights]
        usual, found = F.linear(x, first), reordered_linear(x, copies[0], None)
    except (AttributeError, RuntimeError):  # this torch or this processor cannot
        return 0.0
    off = float((found - usual).abs().max() / usual.abs().max().clamp(min=1e-6))
    if not off <= _TOLERANCE[first.dtype]:
        return 0.0
    before = _seconds(lambda weight: F.linear(x, weight), weights)
    after = _seconds(lambda copied: reordered_linear(x, copied, None), copies)
    return before - after if after <= (1 - _GAIN) * before else 0.0


def _seconds(product: Callable[[Any], Tensor], weights: Sequence[Tensor]) -> float:
    """Time of one product: the best of a few, as others use the machine."""
    times = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        for weight in weights:
            product(weight)
        times.append(time.perf_counter() - began)
    return min(times) / len(weights)


def _reads_copy(x: Any, weight: Any) -> bool:
    fits = type(weight) is Reordered and type(x) is Tensor and x.dtype is weight.dtype and x.numel() > 0
    if not fits or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return weight.__dict__.get("state") == _state(weight)


def _state(weight: Tensor) -> tuple[int, int]:
    return weight._version, weight.data_ptr()


def _size(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()
