"""Follow every tensor of a computation: how many bytes are alive, and in which part of a training step."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakTensorKeyDictionary

from adapterlab.engine import float_products
from adapterlab.errors import ConfigError
from adapterlab.foreign.private_torch import (
    DispatchKey,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    is_composed,
    tree_iter,
    unset_fake_temporarily,
)
from adapterlab.ops import cross_entropy

aten = torch.ops.aten
_TRANSPARENT = ("adapterlab",)  # operators whose kernels are made of further operators: their inside is followed
_MASKED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
_PATIENCE = 1000
_REAL, _DRAWN = 2**26, 2**16  # elements of the largest real tensors of whole numbers; of random ones
_COMPARED = (aten.allclose.default, aten.equal.default)


class NeedsNumbers(ConfigError):
    """What happens depends on computed numbers, whatever the number of layers."""


@dataclass
class Moment:
    """The fullest moment of one window of a step.

    Attributes:
        total: live bytes.
        parts: the same by what they are for.
    """

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class Tracker(TorchDispatchMode):
    """Counts live bytes by part while code runs, and the floating-point operations.

    With a fake mode, floating-point tensors have no contents, while whole numbers and truth values are real: masks,
    labels and counts are what they are in a run, so that code which looks at them takes its usual way. Huge ones are
    not, and neither are many random ones, which would take a run's memory and tell nothing. A number read
    out of a tensor without contents is answered with changing ones, so that code which tries until it succeeds ends.

    Attributes:
        live: bytes alive by part; `total` is their sum.
        moments: fullest moment of each window.
        flops: floating-point operations of products.
    """

    def __init__(self, fake: FakeTensorMode | None = None, granularity: int = 1, kind: str = "cpu"):
        super().__init__()
        self.fake, self.granularity, self.kind = fake, granularity, kind
        self.live: Counter[str] = Counter()
        self.total = self.flops = 0
        self.window, self.part = "setup", "other"
        self.moments: dict[str, Moment] = {}
        self._held: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._integers, self._reals = itertools.cycle((0, 1)), itertools.cycle((1.0, 0.01, 10.0))
        self._truths = 0
        self._searches = WeakTensorKeyDictionary()
        self._self = weakref.ref(self)  # callbacks of tensors that live on must not keep the tracker alive
        self._counts, self._workspaces = _counts(), _workspaces(kind)

    # ------------------------------------------------------------------ what the caller says

    def enter(self, window: str, part: str | None = None) -> None:
        """Begin a window of the step; new tensors belong to a part from now on."""
        self.window, self.part = window, part or window
        self._note()

    def assign(self, tensor: Tensor, part: str) -> None:
        """Say that a tensor belongs to a part."""
        storage = tensor.untyped_storage()
        self._hold(storage)
        ref, size, before = self._held[id(storage)]
        self._held[id(storage)] = (ref, size, part)
        self.live[before] -= size
        self.live[part] += size

    def part_of(self, tensor: Tensor) -> str:
        """Return the part that a tensor belongs to."""
        storage = tensor.untyped_storage()
        self._hold(storage)
        return self._held[id(storage)][2]

    def rename(self, before: str, part: str) -> None:
        """Say that everything alive of one part belongs to another."""
        for key, (ref, size, tag) in list(self._held.items()):
            if tag == before:
                self._held[key] = (ref, size, part)
        self.live[part] += self.live.pop(before, 0)

    def snapshot(self) -> dict[str, int]:
        """Return live bytes by part."""
        return {part: size for part, size in self.live.items() if size}

    # ------------------------------------------------------------------ what happens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_composed(func) and func.overloadpacket not in self._counts:
            with self:  # its parts are what is computed; autograd takes most such operators apart, but not inside nodes
                return func.decompose(*args, **kwargs)
        extra = self._inside(func, args, kwargs) if func.namespace in _TRANSPARENT else None
        out = self._watch(func(*args, **kwargs) if self.fake is None else self._simulate(func, args, kwargs))
        declared = self._workspaces.get(func)
        if declared is not None:
            extra = declared(*args, **kwargs)
        if extra:
            self._note(extra)
        count = self._counts.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out

    def _inside(self, func: Any, args: Any, kwargs: Any) -> int:
        """Bytes that an operator of the library takes beside its results; its kernel is made of further operators."""
        key = (func, self.kind, *(_form(leaf) for leaf in tree_iter((args, kwargs))))
        if key not in _INSIDES or self.fake is None:
            inner = Tracker(self.fake, kind=self.kind)
            inner._watch((args, kwargs))
            given = inner.total
            with inner, inner._short():
                out = func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            peak = max((moment.total for moment in inner.moments.values()), default=0)
            results = {id(leaf.untyped_storage()): leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)}
            kept = sum(leaf.untyped_storage().nbytes() for leaf in results.values())
            _INSIDES[key] = (max(0, peak - given - kept), inner.flops)
        extra, flops = _INSIDES[key]
        self.flops += flops
        return extra

    def _short(self) -> contextlib.AbstractContextManager[Any]:
        """Leave out most of the parts that an operator works on one after the other, where nothing is computed."""
        return contextlib.nullcontext() if self.fake is None else patch.object(cross_entropy, "slices", self._few)

    def _few(self, total: int, size: int) -> Iterator[slice]:
        """The first two parts and the last; those between are like the second, and only their work is counted."""
        parts = [slice(start, start + size) for start in range(0, total, max(1, size))]
        for part in [*parts[:2], *parts[2:][-1:]]:
            before = self.flops
            yield part
            if len(parts) > 3 and part is parts[1]:
                self.flops += (self.flops - before) * (len(parts) - 3)

    def _simulate(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        if not given:
            out = func(*args, **kwargs)
            return self._really(func, args, kwargs) if _whole(out) and _small(func, out) else out
        if not any(isinstance(tensor, FakeTensor) for tensor in given):
            out = self._really(func, args, kwargs)
            return out if _whole(out) else func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._answer(args[0])
        if func.overloadpacket is aten.any:
            found = func(*args, **kwargs)
            self._searches[found] = True
            return found
        if func in _COMPARED:
            return True
        if func in _MASKED:
            args = (args[0], _positions(args[1]), *args[2:])
        if func in (aten.nonzero.default, aten.masked_select.default, aten._unique2.default):
            raise NeedsNumbers(
                f"The shape of a result of {func} depends on computed numbers, which a plan does not have. Methods and "
                "models that choose by value cannot be planned; measure a short run instead."
            )
        if func is aten._grouped_mm.default:
            return _grouped(*args, **kwargs)
        return func(*args, **kwargs)

    def _really(self, func: Any, args: Any, kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _answer(self, tensor: Any) -> bool | int | float:
        if tensor.constant is not None:
            with unset_fake_temporarily():
                found: bool | int | float = tensor.constant.item()
                return found
        if tensor.dtype is torch.bool:
            self._truths += 1
            # Nothing is found in `any`, and now and then the answer is False: some code repeats while it is not.
            return tensor not in self._searches and bool(self._truths % _PATIENCE)
        return next(self._reals) if tensor.dtype.is_floating_point else next(self._integers)

    def _watch(self, out: Any) -> Any:
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._hold(leaf.untyped_storage())
        return out

    def _hold(self, storage: Any) -> None:
        key = id(storage)
        if key in self._held:
            return
        size = -(-storage.nbytes() // self.granularity) * self.granularity
        self._held[key] = (weakref.ref(storage, functools.partial(_release, self._self, key)), size, self.part)
        self.live[self.part] += size
        self.total += size
        self._note()

    def _note(self, extra: int = 0) -> None:
        moment = self.moments.get(self.window)
        if moment is None:
            moment = self.moments[self.window] = Moment()
        if self.total + extra > moment.total:
            moment.total, moment.parts = self.total + extra, dict(self.live)
            if extra:
                moment.parts[KERNELS] = moment.parts.get(KERNELS, 0) + extra


KERNELS = "inside kernels"
_INSIDES: dict[Any, tuple[int, int]] = {}  # what operators take inside, by operator and form of the arguments


def _form(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _release(held: weakref.ref[Tracker], key: int, _: Any) -> None:
    tracker = held()
    if tracker is not None:
        _, size, part = tracker._held.pop(key)
        tracker.live[part] -= size
        tracker.total -= size


def _whole(out: Any) -> bool:
    """Say whether all results are whole numbers or truth values."""
    return all(
        not (leaf.dtype.is_floating_point or leaf.dtype.is_complex)
        for leaf in tree_iter(out)
        if isinstance(leaf, Tensor)
    )


def _small(func: Any, out: Any) -> bool:
    """Say whether whole numbers are worth making."""
    most = _DRAWN if torch.Tag.nondeterministic_seeded in func.tags else _REAL
    return all(leaf.numel() <= most for leaf in tree_iter(out) if isinstance(leaf, Tensor))


def _positions(indices: Any) -> list[Tensor | None]:
    """Replace real masks among indices by the positions they choose, whose number is known."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                found.extend(index.nonzero(as_tuple=True))
        else:
            found.append(index)
    return found


def _grouped(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Products of groups of rows: torch knows their shapes in bfloat16 only, though kernels take other precisions."""
    dtype = kwargs.get("out_dtype") or a.dtype
    out: Tensor = aten._grouped_mm.default(a.bfloat16(), b.bfloat16(), *args, **{**kwargs, "out_dtype": None})
    return out.to(dtype)


class _Contentless(FakeTensorMode):
    """A mode that tensors and their copies share.

    `copy.deepcopy` of a tensor without contents copies its mode, too, with weak references to storages in it: each
    copy would give back the same count once more, and memory that is in use would be freed.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Contentless:
        return self


@contextlib.contextmanager
def contentless() -> Iterator[FakeTensorMode]:
    """A mode in which floating-point tensors have no contents, for a `Tracker` to run on."""
    with _Contentless(allow_non_fake_inputs=True, allow_fallback_kernels=False) as mode:
        yield mode


def _attention(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kw: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


def _grouped_product(a: Tensor, b: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Each row, or each column where those are in groups, meets one matrix."""
    return 2 * (a.shape[-2] * b.numel() if a.dim() > b.dim() else a.numel() * b.shape[-1])


def _packed_product(a: Tensor, b: Tensor, shape: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 2 * (a.numel() // a.shape[-1]) * int(shape[0]) * int(shape[1])


def _counts() -> dict[Any, Callable[..., int]]:
    """Floating-point operations by operator; bitsandbytes' own where it is loaded."""
    found: dict[Any, Callable[..., int]] = dict(flop_registry)
    found[aten._grouped_mm] = _grouped_product
    found |= {aten.addmm_: found[aten.addmm], aten.baddbmm_: found[aten.baddbmm]}
    found[aten._scaled_dot_product_flash_attention_for_cpu] = _attention
    found[aten._scaled_dot_product_flash_attention_for_cpu_backward] = _attention_backward
    if "bitsandbytes" in sys.modules:
        found[torch.ops.bitsandbytes.gemm_4bit] = _packed_product
    return found


def _workspaces(kind: str) -> dict[Any, Callable[..., int]]:
    """Bytes that kernels take for themselves, by operator."""
    found: dict[Any, Callable[..., int]] = {}
    if kind == "cpu":
        found |= dict.fromkeys(float_products.OPERATORS, float_products.copied)
    if "bitsandbytes" in sys.modules:
        found[torch.ops.bitsandbytes.gemm_4bit.default] = _unpacked
    if kind == "cuda":
        found[aten._scaled_dot_product_flash_attention_for_cpu_backward.default] = _sums
    return found


def _sums(grad: Tensor, query: Tensor, *args: Any, **kwargs: Any) -> int:
    """The backward pass of fused attention on a GPU sums the queries' gradient in float32, and a number each row."""
    return 4 * (query.numel() + query.numel() // query.shape[-1])


def _unpacked(a: Tensor, b: Tensor, shape: Any, *args: Any, **kwargs: Any) -> int:
    """A packed product unpacks its weight to the dtype of its input."""
    return int(shape[0]) * int(shape[1]) * a.dtype.itemsize
