"""Products in half precision on a processor without instructions for it: computed in float32, block by block.

torch computes them there one number at a time: y = x Wᵀ takes six times as long as in float32, the product of a
gradient with W some thirty times. Inside `fast_products` their operands are copied to float32, a block of limited size
at a time, and the result is rounded once, as instructions for half precision do it. Weights, activations and gradients
stay in half precision, and so does what autograd keeps: torch's kernels are replaced below autograd, for whoever calls
them.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.library import Library

from adapterlab.engine.norms import HALF
from adapterlab.foreign.private_torch import BELOW_AUTOGRAD, without
from adapterlab.foreign.processor import slow_in

_OPERANDS = 3  # of an operator at most; what follows has dtypes of its own
_BLOCK = 1 << 22  # numbers of an operand that are copied at a time
_WORTH = 5  # multiplications for each number that is copied or rounded, from which that costs less than it saves


def fast_products(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Compute products in half precision as fast as this machine can, inside the context.

    On a CPU without instructions for bfloat16 or float16 (most laptops) a training step in half precision takes about
    as long as in float32 then, and ten to twenty times as long without. Elsewhere, and for models in float32, it does
    nothing. Forward and backward pass belong into the same context. Other threads of the process compute in the same
    way meanwhile.

    Args:
        model: whose weights say where and in which precision products are computed.
    """
    dtypes = {p.dtype for p in model.parameters() if p.dtype in HALF and p.device.type == "cpu"}
    return FloatProducts() if any(map(slow_in, dtypes)) else contextlib.nullcontext()


class FloatProducts:
    """Inside the context, products of half precision on the CPU are computed in float32, in the whole process."""

    _lock = threading.Lock()
    _entered: ClassVar[int] = 0
    _kernels: ClassVar[Library | None] = None

    def __enter__(self) -> None:
        cls = FloatProducts
        with cls._lock:
            cls._entered += 1
            if cls._kernels is None:
                cls._kernels = Library("aten", "IMPL", BELOW_AUTOGRAD)
                for func, computed in _COMPUTED.items():
                    cls._kernels.impl(func.name(), functools.partial(_kernel, func, computed), with_keyset=True)

    def __exit__(self, *error: object) -> None:
        cls = FloatProducts
        with cls._lock:
            cls._entered -= 1
            if not cls._entered:
                cls._kernels = None  # torch's own are back


def _kernel(func: Any, computed: Callable[..., Any], keys: Any, *args: Any, **kwargs: Any) -> Any:
    usual = functools.partial(func.redispatch, without(keys, BELOW_AUTOGRAD))
    if not _are_half(args[:_OPERANDS]):
        return usual(*args, **kwargs)
    return computed(usual, *args, **kwargs)


def _are_half(operands: Sequence[Any]) -> bool:
    """Operands of several dtypes are torch's to refuse."""
    given = [value for value in operands if isinstance(value, Tensor)]
    return all(map(_is_half, given)) and len({t.dtype for t in given}) == 1


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF and value.device.type == "cpu"


# ---------------------------------------------------------------------- products of matrices

Usual = Callable[..., Any]  # torch's kernel


def _mm(usual: Usual, a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    if not _pays(a, b):
        return usual(a, b) if out is None else usual(a, b, out=out)
    return _multiplied(_result(out, a, len(a), b.shape[1]), a, b)


def _addmm(
    usual: Usual, c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    if not _pays(a, b):
        return usual(c, a, b, beta=beta, alpha=alpha, **({} if out is None else {"out": out}))
    shape = (len(a), b.shape[1])
    return _multiplied(_result(out, a, *shape), a, b, c.expand(shape), beta, alpha)


def _pays(a: Tensor, b: Tensor) -> bool:
    m, k, n = *a.shape, b.shape[1]
    return m * k * n >= _WORTH * (m * k + k * n + m * n)


def _result(out: Tensor | None, like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape) if out is None else out.resize_(shape)


def _multiplied(
    out: Tensor, a: Tensor, b: Tensor, c: Tensor | None = None, beta: float = 1, alpha: float = 1
) -> Tensor:
    """Write beta c + alpha a b into out `[m, n]`, for a `[m, k]` and b `[k, n]`; c may be out."""
    if a.numel() > b.numel():  # the smaller one is copied as a whole
        _multiplied(out.t(), b.t(), a.t(), None if c is None else c.t(), beta, alpha)
        return out
    k, n = b.shape
    a = a.float()
    if n >= k:
        for part in _parts(n, k):
            out[:, part] = _added(a @ b[:, part].float(), None if c is None else c[:, part], beta, alpha)
        return out
    total = a.new_zeros(out.shape)
    for part in _parts(k, n):
        total.addmm_(a[:, part], b[part].float())
    return out.copy_(_added(total, c, beta, alpha))


def _added(product: Tensor, c: Tensor | None, beta: float, alpha: float) -> Tensor:
    if alpha != 1:
        product *= alpha
    return product if c is None or beta == 0 else product.add_(c, alpha=beta)


def _step(length: int, width: int) -> int:
    """How many rows or columns of a width have no more than `_BLOCK` numbers."""
    return min(length, max(1, _BLOCK // max(1, width)))


def _parts(length: int, width: int) -> Iterator[slice]:
    step = max(1, _step(length, width))
    return (slice(start, start + step) for start in range(0, length, step))


def _bmm(usual: Usual, a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    out = _result(out, a, len(a), a.shape[1], b.shape[2])
    for part in _batches(a, b):
        out[part] = a[part].float() @ b[part].float()
    return out


def _baddbmm(
    usual: Usual, c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    shape = (len(a), a.shape[1], b.shape[2])
    out, c = _result(out, a, *shape), c.expand(shape)
    for part in _batches(a, b):
        out[part] = _added(a[part].float() @ b[part].float(), c[part], beta, alpha)
    return out


def _batches(a: Tensor, b: Tensor) -> Iterator[slice]:
    return _parts(len(a), max(a.shape[1] * a.shape[2], b.shape[1] * b.shape[2]))


def _in_place(computed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same into the first operand, for an operator that has no `out`."""

    def into(usual: Usual, c: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def torchs(*operands: Any, out: Tensor, **others: Any) -> Any:
            return usual(*operands, **others)

        return computed(torchs, c, *args, **kwargs, out=c)

    return into


# ---------------------------------------------------------------------- convolution and attention


def _as_a_whole(*sums: int) -> Callable[..., Any]:
    """Copy all operands and round all results, but for those that are sums in float32 always."""

    def computed(usual: Usual, *args: Any, **kwargs: Any) -> Any:
        half = args[0].dtype
        found = usual(*map(_float, args), **{key: _float(value) for key, value in kwargs.items()})
        if isinstance(found, Tensor):
            return found.to(half)
        return tuple(t.to(half) if t is not None and i not in sums else t for i, t in enumerate(found))

    return computed


def _float(value: Any) -> Any:
    return value.float() if _is_half(value) else value


# ---------------------------------------------------------------------- all of them

_ATEN = torch.ops.aten
_COMPUTED: dict[Any, Callable[..., Any]] = {
    _ATEN.mm.default: _mm,
    _ATEN.mm.out: _mm,
    _ATEN.addmm.default: _addmm,
    _ATEN.addmm.out: _addmm,
    _ATEN.addmm_.default: _in_place(_addmm),
    _ATEN.bmm.default: _bmm,
    _ATEN.bmm.out: _bmm,
    _ATEN.baddbmm.default: _baddbmm,
    _ATEN.baddbmm.out: _baddbmm,
    _ATEN.baddbmm_.default: _in_place(_baddbmm),
    _ATEN.convolution.default: _as_a_whole(),
    _ATEN.convolution_backward.default: _as_a_whole(),
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default: _as_a_whole(1),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default: _as_a_whole(),
}
OPERATORS = frozenset(_COMPUTED)


def copied(*args: Any, **kwargs: Any) -> int:
    """Return the bytes of the copies that one of `OPERATORS` holds at a time on this machine, given its arguments."""
    operands = [value for value in args[:_OPERANDS] if isinstance(value, Tensor)]
    if not _are_half(operands) or not slow_in(operands[0].dtype):
        return 0
    a, b = operands[-2:]
    if a.dim() == b.dim() == 2:
        return 4 * _held(a.shape[0], a.shape[1], b.shape[1]) if _pays(a, b) else 0
    if a.dim() == b.dim() == 3:
        (count, m, k), n = a.shape, b.shape[2]
        return 4 * _step(count, max(m * k, k * n)) * (m * k + k * n + m * n)
    return 4 * sum(map(Tensor.numel, operands))


def _held(m: int, k: int, n: int) -> int:
    """Numbers in float32, while a product of `[m, k]` and `[k, n]` is computed."""
    m, n = min(m, n), max(m, n)
    if n >= k:
        step = _step(n, k)
        return m * k + step * k + m * step
    return m * k + _step(k, n) * n + m * n
