"""Activations that are not kept for the backward pass: computed again, or moved to the CPU's memory.

Checkpointing is always non-reentrant. What changes between two forward passes of one backward pass is recorded with
each and shown again during its recomputation.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from adapterlab.errors import ConfigError, nearest
from adapterlab.foreign.private_torch import DispatchKey, StorageWeakRef, TorchDispatchMode, _SetExcludeDispatchKeyGuard
from adapterlab.foreign.private_transformers import change_checkpoints
from adapterlab.foreign.process_memory import Heap

if TYPE_CHECKING:
    from adapterlab.engine.attachments import Attachments

Mode = Literal["none", "cheap", "full"]
Context = contextlib.AbstractContextManager[Any]
MODES: tuple[str, ...] = get_args(Mode)
# Operators whose results are dear: every product, and every kernel of these libraries.
_PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "linear", "convolution", "_scaled_mm", "_grouped_mm",
    "_int_mm", "mkldnn_convolution", "_mkldnn_rnn_layer", "_linear_pointwise", "_flex_attention",
}  # fmt: skip
_ATTENTION = "scaled_dot_product"
_LIBRARIES = ("adapterlab", "flash_attn")
LARGE = 1 << 20  # bytes below which moving a tensor to the CPU and back is not worth its while


def recompute(host: Attachments, mode: Mode, *, compiled: bool = False) -> None:
    """Choose what a model keeps for the backward pass; see `Host.recompute`."""
    if mode not in MODES:
        raise ConfigError(f"recompute is one of {', '.join(MODES)}; received {mode!r}. {nearest(str(mode), MODES)}")
    model: Any = host.model
    if mode == "none":
        if supports(model):
            _switch(model, "disable")()
        return
    if not supports(model):
        raise ConfigError(
            f"{type(model).__name__} has no blocks that can be computed again. Set recompute to none, or use a model "
            "of transformers that supports gradient checkpointing."
        )
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if not compiled:
        how = functools.partial(_tidied, host, Heap()) if mode == "full" else functools.partial(_contexts, host)
        kwargs["context_fn"] = how
    elif mode == "cheap":
        kwargs["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    _release_inputs(model)
    _switch(model, "enable")(kwargs)
    _release_inputs(model)  # enabling may set the hook anew, and would then forget an earlier one


def keep_record(host: Attachments) -> None:
    """Let checkpointing that others have switched on show each recomputation what its first pass saw.

    It becomes non-reentrant, as ours is: what a block emits needs a gradient.
    """

    def recorded(options: dict[str, Any]) -> dict[str, Any]:
        theirs = options.get("context_fn")
        if getattr(getattr(theirs, "func", None), "__module__", None) == __name__:
            return options
        how = functools.partial(recomputation, host) if theirs is None else functools.partial(_beside, host, theirs)
        return {**options, "use_reentrant": False, "context_fn": how}

    change_checkpoints(host.model, recorded)


def _beside(host: Attachments, theirs: Callable[[], tuple[Context, Context]]) -> tuple[Context, Context]:
    """Contexts of others for `torch.utils.checkpoint`, with the record of the state beside them."""
    first, again = theirs()
    seen = recomputation(host)[1]
    return first, Repeated(lambda: seen, lambda: again)


def recomputation(host: Attachments) -> tuple[Context, Context]:
    """Contexts for `torch.utils.checkpoint`: the recomputation sees the state of the first pass."""
    seen = host.state.snapshot()
    return contextlib.nullcontext(), Repeated(lambda: host.state.replay(seen))


def supports(model: nn.Module) -> bool:
    """Say whether the blocks of a model can be computed again."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def _switch(model: Any, what: str) -> Callable[..., None]:
    """The model's switch, whose name changed from `gradient_` to `activation_checkpointing` in transformers 5.2x."""
    new, old = f"activation_checkpointing_{what}", f"gradient_checkpointing_{what}"
    found: Callable[..., None] = getattr(model, new) if hasattr(model, new) else getattr(model, old)
    return found


def _release_inputs(model: Any) -> None:
    """Without reentry no gradient is needed at the input, and the hook that makes one breaks full graphs."""
    if getattr(model, "_require_grads_hook", None) is not None:
        model.disable_input_require_grads()


def _tidied(host: Attachments, heap: Heap) -> tuple[Context, Context]:
    """Contexts for `torch.utils.checkpoint`: what a block has freed is given back before the next one needs memory."""
    first, again = recomputation(host)
    return Repeated(heap.tidied, lambda: first), Repeated(heap.tidied, lambda: again)


# ---------------------------------------------------------------------- keeping products only


def _contexts(host: Attachments) -> tuple[Context, Context]:
    """Contexts for `torch.utils.checkpoint`: products of the first pass stand in for their recomputation."""
    kept: dict[Any, list[_Result | None]] = defaultdict(list)
    first, again = recomputation(host)
    return Repeated(lambda: first, lambda: _Keep(kept)), Repeated(lambda: again, lambda: _Show(kept))


class Repeated:
    """A context that can be entered again and again, for graphs that are walked backwards more than once."""

    def __init__(self, *makers: Callable[[], Context]):
        self.makers = makers
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            for make in self.makers:
                stack.enter_context(make())
            self._entered = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What the compiler's partitioner should keep."""
    dear = is_product(operator) and not _draws(operator, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def is_product(operator: Any) -> bool:
    """Say whether an operator's results are kept when only the cheap ones are computed again.

    They must be new tensors: what is written in place, or is a view, has to be made again.
    """
    schema = getattr(operator, "_schema", None)
    if schema is None or schema.is_mutable or any(value.alias_info is not None for value in schema.returns):
        return False
    library, _, name = schema.name.partition("::")
    return library in _LIBRARIES or name in _PRODUCTS or _ATTENTION in name


@functools.cache
def _dropout_position(operator: Any) -> int | None:
    names = [argument.name for argument in operator._schema.arguments]
    return names.index("dropout_p") if "dropout_p" in names else None


def _draws(operator: Any, args: Any, kwargs: Any) -> bool:
    """Whether this call takes random numbers: left out, it would shift those of all that come after it."""
    position = _dropout_position(operator)
    if position is None:
        return False
    return bool(args[position] if position < len(args) else kwargs.get("dropout_p", 0.0))


class _Result:
    """What an operator returned, and whether it is still what it was."""

    def __init__(self, value: Any):
        self.value = tuple(map(_held, value)) if isinstance(value, (tuple, list)) else _held(value)
        self._watched: list[tuple[Tensor, int]] = []
        for tensor in self.tensors:
            self.watch(tensor)

    @property
    def tensors(self) -> list[Tensor]:
        every = self.value if isinstance(self.value, tuple) else (self.value,)
        return [value for value in every if isinstance(value, Tensor)]

    def watch(self, tensor: Tensor) -> None:
        """Notice changes made through this tensor, which shares memory with the result."""
        self._watched.append((tensor, tensor._version))

    @property
    def intact(self) -> bool:
        return all(tensor._version == version for tensor, version in self._watched)


def _held(value: Any) -> Any:
    """A tensor with the same memory and the same count of changes, but without the graph, which would hold itself."""
    if not isinstance(value, Tensor):
        return value
    with _SetExcludeDispatchKeyGuard(DispatchKey.ADInplaceOrView, False):  # or the count would be its own
        return value.detach()


class _Keep(TorchDispatchMode):
    """Keeps the results of products, in order."""

    def __init__(self, kept: dict[Any, list[_Result | None]]):
        super().__init__()
        self.kept = kept
        self._owners: dict[int, _Result] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if is_product(func):
            result = None if _draws(func, args, kwargs) else _Result(out)
            self.kept[func].append(result)
            if result is not None:
                self._owners.update(dict.fromkeys(map(_memory, result.tensors), result))
        elif func is torch.ops.aten._unsafe_view.default and (result := self._owners.get(_memory(out))) is not None:
            result.watch(_held(out))  # this operator shares memory, and counts changes anew
        return out


class _Show(TorchDispatchMode):
    """Returns kept results instead of computing them; what was changed in place since is computed again."""

    def __init__(self, kept: dict[Any, list[_Result | None]]):
        super().__init__()
        self.kept = kept
        self._next: dict[Any, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_product(func):
            results, index = self.kept.get(func, ()), self._next[func]
            self._next[func] += 1
            result = results[index] if index < len(results) else None
            if result is not None and result.intact:
                return _again(result.value)
        return func(*args, **(kwargs or {}))


def _again(value: Any) -> Any:
    """A fresh handle for each recomputation: autograd writes into the one it is given."""
    return tuple(map(_held, value)) if isinstance(value, tuple) else _held(value)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


# ---------------------------------------------------------------------- moving activations to the CPU


class _Moved:
    """An activation in the CPU's memory."""

    def __init__(self, tensor: Tensor, pinned: bool):
        self.device = tensor.device
        self.copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        self.copy.copy_(tensor, non_blocking=pinned)

    def back(self) -> Tensor:
        return self.copy.to(self.device, non_blocking=self.copy.is_pinned())


class Offload(saved_tensors_hooks):
    """Inside this context, large activations that are kept for the backward pass go to pinned CPU memory.

    Parameters, buffers and views of them stay where they are, and what several operators keep is moved once. The copies
    run in the current stream, so no memory is used again before they are done.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        least: int = LARGE,
        moves: Callable[[Tensor], bool] = lambda tensor: tensor.device.type != "cpu",
    ):
        """Set what is moved.

        Args:
            model: whose parameters and buffers stay.
            least: bytes of the smallest tensor that is moved.
            moves: says of a tensor whether it is on a device that activations should leave.
        """
        super().__init__(self._pack, self._unpack)
        self.model, self.least, self.moves = model, least, moves
        self._fixed: set[StorageWeakRef] = set()
        self._known: WeakValueDictionary[Any, _Moved] = WeakValueDictionary()

    def __enter__(self) -> None:
        held = [*self.model.parameters(), *self.model.buffers()]
        self._fixed = {StorageWeakRef(tensor.untyped_storage()) for tensor in held if _plain(tensor)}
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fixed, self._known = set(), WeakValueDictionary()

    def _pack(self, tensor: Tensor) -> Any:
        if not _plain(tensor) or tensor.nbytes < self.least or not self.moves(tensor):
            return tensor
        memory = StorageWeakRef(tensor.untyped_storage())
        if memory in self._fixed:
            return tensor
        key = (memory, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
        moved = self._known.get(key)
        if moved is None:
            moved = self._known[key] = _Moved(tensor, torch.accelerator.is_available())
        return moved

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        tensor: Tensor = packed.back() if isinstance(packed, _Moved) else packed
        return tensor


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided


def offloading(model: nn.Module, wanted: bool) -> Context:
    """Return the context of a forward pass: an `Offload`, or none.

    Raises:
        ConfigError: the model is on the CPU.
    """
    if not wanted:
        return contextlib.nullcontext()
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        raise ConfigError(
            "offload=True moves activations from a GPU's memory to the CPU's, and the model is on the CPU: there is "
            "nothing to offload to. Set offload to false; recompute=cheap or full saves memory here."
        )
    return Offload(model)
