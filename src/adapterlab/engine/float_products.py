"""Products in half precision on a processor without instructions for it: computed in float32, block by block.

torch computes them there one number at a time: y = x Wᵀ takes six times as long as in float32, the product of a
gradient with W forty times. Inside `fast_products` their operands are copied to float32, a block of limited size at a
time, and the result is rounded once, as instructions for half precision do it. Weights, activations and gradients stay
in half precision, and so does what autograd keeps: it works below autograd, whoever calls an operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterlab.engine.norms import HALF
from adapterlab.foreign.private_torch import DispatchKey, FakeTensor, TorchDispatchMode, is_composed
from adapterlab.foreign.processor import slow_in
from adapterlab.ops.operator import NAMESPACE

_PLAIN = (nn.Parameter, FakeTensor)  # further kinds of tensors that hold their numbers themselves, or none
_OPERANDS = 3  # of an operator at most; what follows has dtypes of its own
_BLOCK = 1 << 22  # numbers of an operand that are copied at a time
_WORTH = 5  # multiplications for each number that is copied or rounded, from which that costs less than it saves


def fast_products(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Compute products in half precision as fast as this machine can, inside the context.

    On a CPU without instructions for bfloat16 or float16 (most laptops) a training step in half precision takes about
    as long as in float32 then, and ten to twenty times as long without. Elsewhere, and for models in float32, it does
    nothing. Forward and backward pass belong into the same context.

    Args:
        model: whose weights say where and in which precision products are computed.
    """
    dtypes = {p.dtype for p in model.parameters() if p.dtype in HALF and p.device.type == "cpu"}
    return FloatProducts() if any(map(slow_in, dtypes)) else contextlib.nullcontext()


class FloatProducts(TorchDispatchMode):
    """Inside the context, products of half precision on the CPU are computed in float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is not Tensor and not issubclass(kind, _PLAIN) for kind in types):
            return NotImplemented  # they say what they are made of, and that comes here again
        kwargs = kwargs or {}
        if (computed := _COMPUTED.get(func)) is not None:
            return (computed if _are_half(args[:_OPERANDS]) else func)(*args, **kwargs)
        if func.namespace == NAMESPACE:
            with self:
                return func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if is_composed(func):  # without autograd nobody takes it apart before
            with self:
                return func.decompose(*args, **kwargs)
        return func(*args, **kwargs)


def _are_half(operands: Sequence[Any]) -> bool:
    """Operands of several dtypes are torch's to refuse."""
    given = [value for value in operands if isinstance(value, Tensor)]
    return all(map(_is_half, given)) and len({t.dtype for t in given}) == 1


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF and value.device.type == "cpu"


# ---------------------------------------------------------------------- products of matrices


def _mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    if not _pays(a, b):
        return _ATEN.mm(a, b) if out is None else _ATEN.mm.out(a, b, out=out)
    return _multiplied(_result(out, a, len(a), b.shape[1]), a, b)


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None) -> Tensor:
    if not _pays(a, b):
        given = {"beta": beta, "alpha": alpha}
        return _ATEN.addmm(c, a, b, **given) if out is None else _ATEN.addmm.out(c, a, b, **given, out=out)
    shape = (len(a), b.shape[1])
    return _multiplied(_result(out, a, *shape), a, b, c.expand(shape), beta, alpha)


def _addmm_(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _addmm(c, a, b, beta=beta, alpha=alpha, out=c)


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
            found = a @ b[:, part].float()
            out[:, part] = _added(found, None if c is None else c[:, part], beta, alpha)
        return out
    total = a.new_zeros(out.shape)
    for part in _parts(k, n):
        total.addmm_(a[:, part], b[part].float())
    return out.copy_(_added(total, c, beta, alpha))


def _added(product: Tensor, c: Tensor | None, beta: float, alpha: float) -> Tensor:
    if alpha != 1:
        product *= alpha
    return product if c is None or beta == 0 else product.add_(c, alpha=beta)


def _parts(length: int, width: int) -> Iterator[slice]:
    """Pieces of so many rows or columns of a width that none has more than `_BLOCK` numbers."""
    step = max(1, _BLOCK // max(1, width))
    return (slice(start, start + step) for start in range(0, length, step))


def _bmm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    out = _result(out, a, len(a), a.shape[1], b.shape[2])
    for part in _batches(a, b):
        out[part] = torch.bmm(a[part].float(), b[part].float())
    return out


def _baddbmm(
    c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    shape = (len(a), a.shape[1], b.shape[2])
    out, c = _result(out, a, *shape), c.expand(shape)
    for part in _batches(a, b):
        out[part] = _added(torch.bmm(a[part].float(), b[part].float()), c[part], beta, alpha)
    return out


def _baddbmm_(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _baddbmm(c, a, b, beta=beta, alpha=alpha, out=c)


def _batches(a: Tensor, b: Tensor) -> Iterator[slice]:
    return _parts(len(a), max(a[0].numel(), b[0].numel()) if len(a) else 1)


# ---------------------------------------------------------------------- convolution and attention


def _as_a_whole(func: Any) -> Callable[..., Any]:
    """An operator whose operands are copied as a whole.

    What it returns in the dtype of its operands is rounded; sums that it returns in float32 always, are not.
    """

    def computed(*args: Any, **kwargs: Any) -> Any:
        half = next(value.dtype for value in args if _is_half(value))
        found = func(*map(_float, args), **{key: _float(value) for key, value in kwargs.items()})
        if isinstance(found, Tensor):
            return found.to(half)
        return tuple(t.to(half) if t is not None and i not in _SUMS.get(func, ()) else t for i, t in enumerate(found))

    return computed


def _float(value: Any) -> Any:
    return value.float() if _is_half(value) else value


_ATEN = torch.ops.aten
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu
_SUMS = {_ATTENTION.default: (1,)}  # of the exponentials of scores
_COMPUTED: dict[Any, Callable[..., Any]] = {
    _ATEN.mm.default: _mm,
    _ATEN.mm.out: _mm,
    _ATEN.addmm.default: _addmm,
    _ATEN.addmm.out: _addmm,
    _ATEN.addmm_.default: _addmm_,
    _ATEN.bmm.default: _bmm,
    _ATEN.bmm.out: _bmm,
    _ATEN.baddbmm.default: _baddbmm,
    _ATEN.baddbmm.out: _baddbmm,
    _ATEN.baddbmm_.default: _baddbmm_,
    **{
        func: _as_a_whole(func)
        for func in (
            _ATEN.convolution.default,
            _ATEN.convolution_backward.default,
            _ATTENTION.default,
            _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
        )
    },
}
