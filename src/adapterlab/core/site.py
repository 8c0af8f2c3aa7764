"""A place in a model that an adapter can attach to. The only file that asks what class a module has.

Every weight is seen as `[out, in]`, whatever its storage: a GPT-2 `Conv1D` is transposed, the kernels of a convolution
are flattened, and an embedding table `[vocabulary, width]` is a linear map on one-hot rows, so `out = width` and
`in = vocabulary`. A method written for
`[out, in]` therefore works on all of them through `weight`, `op` and `mix`.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from adapterlab.foreign.calls import argument_names
from adapterlab.foreign.model import ADAPTERS, brought, elsewhere, plain_class
from adapterlab.foreign.quantized import compute_dtype, dense, is_quantized, unpacks_in_training

UNMERGED = "_adapterlab_unmerged"  # attribute of a merged module: a stand-in with the parameters it had before


class Kind:
    """What adapters need to know about one kind of module."""

    name = "block"

    def matches(self, module: nn.Module) -> bool:
        """Say whether the module is of this kind."""
        return True

    def shape(self, module: nn.Module) -> tuple[int, int] | None:
        """`(out, in)` of the weight, or None when the module has no single weight."""
        return None

    def matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        """See a tensor laid out as the module stores its weight as `[out, in]`."""
        raise TypeError(f"{type(module).__name__} has no single weight")

    def stored(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """Lay `[out, in]` out as the module stores its weight; most layouts are their own inverse."""
        return self.matrix(module, matrix)

    def op(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """The module's own operation with another weight `[any, in]` and no bias."""
        raise TypeError(f"{type(module).__name__} is not an operation with one weight")

    def mix(self, module: nn.Module, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Mix the channels of an output of `op` by `[out, any]`."""
        return F.linear(h, weight, bias)

    def gain(self, module: nn.Module) -> float | Tensor:
        """What the operation multiplies its result by; `op` contains it."""
        return 1.0


class Linear(Kind):
    """`nn.Linear` and those of its subclasses, packed ones among them, that compute y = x Wᵀ."""

    name = "linear"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and _keeps_its_word(module)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return module.out_features, module.in_features  # type: ignore[return-value]

    def matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        return stored

    def op(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class Transposed(Linear):
    """GPT-2's `Conv1D`: a linear layer whose weight is stored `[in, out]`."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Conv1D)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return module.nf, module.nx  # type: ignore[return-value]

    def matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        return stored.T


class Embedding(Kind):
    """`nn.Embedding`: a linear map on one-hot rows, W = tableᵀ; some models' multiply the rows they return."""

    name = "embedding"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return module.embedding_dim, module.num_embeddings  # type: ignore[return-value]

    def matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        return stored.T

    def op(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        # The base's max_norm is left out on purpose: it would renormalise the adapter's own tensor in place.
        y = F.embedding(x, weight.T, padding_idx=module.padding_idx)  # type: ignore[arg-type]
        return y * self.gain(module) if hasattr(module, "embed_scale") else y

    def gain(self, module: Any) -> float | Tensor:
        scale: float | Tensor = getattr(module, "embed_scale", 1.0)
        return scale.to(module.weight.dtype) if isinstance(scale, Tensor) else scale


class Conv(Kind):
    """`nn.Conv1d`, `Conv2d` and `Conv3d`: kernels `[out, in / groups, *k]` seen as `[out, in / groups · prod(k)]`.

    With groups, the rows of a weight are shared out among the groups as those of the module's own are.
    """

    name = "conv"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def shape(self, module: Any) -> tuple[int, int]:
        return module.out_channels, module.in_channels // module.groups * math.prod(module.kernel_size)

    def matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def stored(self, module: Any, matrix: Tensor) -> Tensor:
        return matrix.reshape(len(matrix), module.in_channels // module.groups, *module.kernel_size)

    def op(self, module: Any, x: Tensor, weight: Tensor) -> Tensor:
        # The module's own method knows its stride, dilation and ways of padding.
        y: Tensor = module._conv_forward(x, self.stored(module, weight), None)
        return y

    def mix(self, module: Any, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rank = len(module.kernel_size)
        y: Tensor = getattr(F, f"conv{rank}d")(h, weight.reshape(*weight.shape, *[1] * rank), bias)
        return y


class Norm(Kind):
    """Normalisation layers: a weight vector and perhaps a bias, no matrix."""

    name = "norm"

    def matches(self, module: nn.Module) -> bool:
        return "norm" in type(module).__name__.lower() and "weight" in module._parameters


KINDS: tuple[Kind, ...] = (Transposed(), Linear(), Embedding(), Conv(), Norm(), Kind())


def _keeps_its_word(module: nn.Linear) -> bool:
    """Say whether a subclass of `nn.Linear` is one; routers and block-diagonal maps in modelling files are not.

    It is tried, once for each class. Packed layers come from elsewhere and are believed.
    """
    cls = plain_class(module)
    if cls.forward is nn.Linear.forward or not cls.__module__.startswith(_MODELLING) or is_quantized(module):
        return True
    if cls not in _TRIED:
        _TRIED[cls] = _is_linear(cls, module)
    return _TRIED[cls]


_MODELLING = ("transformers.models.", "transformers_modules.")
_TRIED: dict[type, bool] = {}


@torch.no_grad()
def _is_linear(cls: type[nn.Linear], module: nn.Linear) -> bool:
    weight = module.weight
    x = torch.linspace(-1, 1, 3 * module.in_features, device=weight.device, dtype=weight.dtype).view(3, -1)
    try:
        y = cls.forward(module, x)
    except Exception:  # whatever it wants is not what a linear layer takes
        return False
    if not isinstance(y, Tensor) or y.shape != (3, module.out_features):
        return False
    return weight.is_meta or torch.allclose(y, F.linear(x, weight, module.bias), rtol=1e-2, atol=1e-3)


@torch.no_grad()
def _offset_of(norm: nn.Module) -> float | None:
    """Try a norm with other weights than its own."""
    cls: Any = plain_class(norm)
    weight = norm._parameters["weight"]
    if weight is None or weight.is_meta or weight.dim() != 1 or norm._modules.keys() - {ADAPTERS} or norm._buffers:
        return None
    x = torch.linspace(-1, 2, 3 * len(weight), device=weight.device, dtype=torch.float64).sin().view(3, -1)
    own = {
        name: None if p is None else torch.zeros_like(p, dtype=torch.float64) for name, p in norm._parameters.items()
    }

    def result(value: float) -> Tensor:
        twin = copy.copy(norm)
        twin.__dict__ = {**norm.__dict__, "_parameters": {**own, "weight": torch.full_like(x[0], value)}}
        return cls.forward(twin, x)  # type: ignore[no-any-return]

    try:
        zero, one, two = map(result, (0.0, 1.0, 2.0))
        n = one - zero
    except Exception:  # whatever it wants is not what such a norm takes
        return None
    off = {offset: (zero - offset * n).abs().max() + (two - (2 + offset) * n).abs().max() for offset in (0.0, 1.0)}
    return next((offset for offset, by in off.items() if by < 1e-4 * n.abs().max()), None)


def is_plain_linear(cls: type) -> bool:
    """Say whether modules of a class are linear layers and nothing else."""
    return cls in (nn.Linear, Conv1D)


def kind_of(module: nn.Module) -> Kind:
    """Return the first kind that matches."""
    return next(kind for kind in KINDS if kind.matches(module))


@dataclass(frozen=True, eq=False)
class Site:
    """One module of a model, seen as an adapter sees it.

    Attributes:
        path: dotted name of the module in the model.
        module: the module itself.
        layer: index of the layer it belongs to in its stack of layers, or None.
        role: `q`, `v`, `down`, ... or None.
        is_head: it lies outside the backbone, or is the output embedding.
        tied: its weight is shared with another module.
        stack: path of the list of layers it belongs to, or None.
        bypassed: class of a module that reads its weight and never calls it, so that no adapter here would run; or "".
        overtaken: a module of torch around it reads its weight on a fast path, which hooks switch off.
    """

    path: str
    module: nn.Module
    layer: int | None = None
    role: str | None = None
    is_head: bool = False
    tied: bool = False
    stack: str | None = None
    bypassed: str = ""
    overtaken: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of what the module's forward takes, in order."""
        return argument_names(plain_class(self.module))

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}

    @property
    def kind(self) -> str:
        """`linear`, `embedding`, `conv`, `norm` or `block`."""
        return kind_of(self.module).name

    @property
    def tokenwise(self) -> bool:
        """Whether the module computes each token by itself, for all that is known of its kind."""
        return self.kind in ("linear", "embedding", "norm")

    @property
    def norm_offset(self) -> float | None:
        """What a norm adds to its weight: o in n ⊙ (w + o) + b, where n depends on x alone, or None."""
        return _offset_of(self.module) if self.kind == "norm" else None

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the weight.

        Raises:
            TypeError: the module has no single weight matrix.
        """
        shape = kind_of(self.module).shape(self.module)
        if shape is None:
            raise TypeError(f"{self.path} ({type(self.module).__name__}) has no weight matrix")
        return shape

    @property
    def bias(self) -> Tensor | None:
        """The bias `[out]`, or None."""
        return self.module._parameters.get("bias")

    @property
    def quantized(self) -> bool:
        """Whether the weight is stored packed."""
        return is_quantized(self.module)

    @property
    def unmerged(self) -> Site:
        """The same place with the weight and bias it had before any adapter was merged into them."""
        before = self.module.__dict__.get(UNMERGED)
        return self if before is None else replace(self, module=before)

    @property
    def plain(self) -> bool:
        """Whether the module is exactly a linear layer with its weight at hand, so that its product may be fused."""
        return is_plain_linear(plain_class(self.module)) and not self.quantized

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored `[in, out]`."""
        return isinstance(self.module, Conv1D)

    @property
    def device(self) -> torch.device:
        """Where the module computes: where its parameters are, or where accelerate brings them for a call."""
        own = (p for p in self.module._parameters.values() if p is not None)
        first = next(own, None)
        first = next(self.module.parameters(), None) if first is None else first
        return elsewhere(self.module) or (torch.device("cpu") if first is None else first.device)

    @property
    def dtype(self) -> torch.dtype:
        """Default dtype of an adapter here: float32 on half or packed weights, else the base's own."""
        base = compute_dtype(self.module)
        return torch.float32 if base.itemsize < 4 or self.quantized else base

    def weight(self) -> Tensor:
        """The weight as `[out, in]` plain numbers: dequantized, `Conv1D` and tables transposed, kernels flattened."""
        with brought(self.module):
            return self.matrix(dense(self.module))

    def at_hand(self, dtype: torch.dtype) -> bool:
        """Say whether a product of the frozen weight with an input of this dtype may be computed in the module's place.

        Packed weights are unpacked for it, where the library does nothing else when it trains. Without gradients its
        own kernels are faster, and a compiler plans by itself.
        """
        weight = self.module._parameters.get("weight")
        if weight is None or weight.requires_grad or compute_dtype(self.module) != dtype:
            return False
        if not self.quantized:
            return self.plain
        eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return eager and unpacks_in_training(self.module, dtype)

    def why_apart(self) -> str:
        """Return why training cannot compute a product with the weight in the module's place, or ""."""
        weight = self.module._parameters.get("weight")
        if self.kind != "linear" or weight is None:
            return f"{self.kind} modules are no single product"
        if weight.requires_grad:
            return "the base weight trains"
        with torch.enable_grad():
            if self.at_hand(compute_dtype(self.module)):
                return ""
        return f"packed weights ({type(weight).__name__})" if self.quantized else "not a plain linear layer"

    def frozen_weight(self, dtype: torch.dtype) -> tuple[Tensor, *tuple[Callable[[], Tensor], ...]]:
        """Return W `[out, in]` for a product and, if it is packed, what unpacks it once more."""

        def unpack() -> Tensor:
            return self.weight().to(dtype)

        if self.quantized:
            return unpack(), unpack
        weight: Any = self.module.weight
        return (weight.T if self.transposed else weight,)

    def matrix(self, stored: Tensor) -> Tensor:
        """See a tensor laid out as the module stores its weight as `[out, in]`."""
        return kind_of(self.module).matrix(self.module, stored)

    def stored(self, matrix: Tensor) -> Tensor:
        """Lay `[out, in]` out as the module stores its weight."""
        return kind_of(self.module).stored(self.module, matrix)

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        """This module's own operation with another weight `[any, in]`, without bias: `[..., any]`."""
        return kind_of(self.module).op(self.module, x, weight)

    def mix(self, h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Mix the channels of an output of `op`: `[..., r]` and `[out, r]` give `[..., out]`, plus a bias `[out]`."""
        return kind_of(self.module).mix(self.module, h, weight, bias)

    @property
    def gain(self) -> float | Tensor:
        """What the module multiplies its rows by, and `op` as well: not 1 for scaled embeddings, such as Gemma's."""
        return kind_of(self.module).gain(self.module)

    @property
    def grouped(self) -> bool:
        """Whether `op` shares the rows of a weight out among groups, so that it does not split into two factors."""
        return int(getattr(self.module, "groups", 1)) > 1

    def parameter(self, *shape: int) -> nn.Parameter:
        """A new zero parameter on this module's device, in the adapter's dtype."""
        return nn.Parameter(torch.zeros(*shape, device=self.device, dtype=self.dtype))

    def parameter_of(self, value: Tensor) -> nn.Parameter:
        """A new parameter on this module's device, in the adapter's dtype, with a copy of these values."""
        copied = value.detach().to(self.device, self.dtype, copy=True, memory_format=torch.contiguous_format)
        return nn.Parameter(copied)

    @contextlib.contextmanager
    def substituted(self, **tensors: Tensor) -> Iterator[None]:
        """Let the module compute with these tensors instead of its own parameters inside the context."""
        slots: list[tuple[Any, str]] = [
            (_owner(self.module, name)._parameters, name.rpartition(".")[2]) for name in tensors
        ]
        saved = [table[leaf] for table, leaf in slots]
        try:
            # Assigned in their places, not removed and added: the order of parameters must stay.
            for (table, leaf), value in zip(slots, tensors.values(), strict=True):
                table[leaf] = value
            yield
        finally:
            for (table, leaf), parameter in zip(slots, saved, strict=True):
                table[leaf] = parameter


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])
