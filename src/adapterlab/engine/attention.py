"""The bridge into the attention core of `transformers`: adapters that see queries, keys and values.

The attention functions that models look up by name are replaced, once for a process, by dispatchers. A dispatcher
finds adapters through the attention module it is given, never through a closure: a function registered for one model
must not serve another model's adapters. For modules without adapters it costs one dictionary look-up.

Inside `fast_attention(model)` the dispatchers of that model's modules also compute the attention by the fastest exact
way, and understand batches whose samples are packed behind each other: samples are then rows to the adapters, those of
one length a batch. What no adapter touches is computed for all samples at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.segments import Who, names_of, segments
from adapterlab.core.state import State
from adapterlab.engine.batch_rows import Batch
from adapterlab.engine.wrapping import STATE, adapters_of, through
from adapterlab.errors import AttachError, ConfigError
from adapterlab.foreign.calls import BOUNDS, PLACES
from adapterlab.foreign.model import ADAPTERS, plain_class
from adapterlab.foreign.private_transformers import attention_implementation, attention_mapping, sdpa_attention_forward
from adapterlab.foreign.written_attention import LINEAR, slopes, written_out
from adapterlab.ops.attention import attention, each_segment, pays, varlen_attention, varlen_works, visible

KEY_BOUNDS, LONGEST, LONGEST_KEYS = "cu_seq_lens_k", "max_length_q", "max_length_k"
PACKED = (BOUNDS, KEY_BOUNDS, LONGEST, LONGEST_KEYS)  # what flash attention in transformers calls them
_CORE = "_adapterlab_core"  # attribute of the attention modules while another function computes their core
_FAST = "_adapterlab_attention"  # attribute of the model while it is fast
Core = Callable[..., Any]  # (module, original, q, k, v, mask, **kwargs) -> (output, weights or None)
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"


@functools.cache
def uses_interface(cls: Any) -> bool:
    """Say whether modules of this class compute attention through the interface of `transformers`."""
    try:
        return f"{_INTERFACE}.get_interface(" in inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False


def is_reached(cls: Any) -> bool:
    """Say whether adapters can stand inside the attention of modules of a class."""
    return uses_interface(cls) or written_out(cls) is not None


def bridge(module: nn.Module) -> None:
    """Make the attention function that a module will look up consult its adapters.

    Raises:
        AttachError: the module computes attention neither through the interface nor in a form that is known.
    """
    cls = plain_class(module)
    if written_out(cls):
        return  # a wrapped module computes it in that form
    if not uses_interface(cls):
        raise AttachError(
            f"{cls.__name__} does not compute attention through the attention interface of transformers, so nothing "
            "can be attached inside it. Choose a method that wraps modules (low-rank updates, bottleneck adapters, "
            "soft prompts at the input), or a model class that uses the interface."
        )
    name = attention_implementation(module)
    mapping = attention_mapping(cls, name)
    if not isinstance(mapping.get(name), _Dispatcher):
        mapping[name] = _Dispatcher(mapping.get(name))


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that compute attention through the interface of `transformers`."""
    return [module for module in model.modules() if uses_interface(plain_class(module))]


@contextlib.contextmanager
def core_attention(modules: Sequence[nn.Module], core: Core | None) -> Iterator[None]:
    """Let another function compute the attention core of some modules inside the context; None: their own.

    Adapters that stand inside the attention stand around it too. Nothing is left behind but idle dispatchers.

    Args:
        modules: of `attention_modules`.
        core: is called as `core(module, original, q, k, v, mask, **kwargs)` and returns what attention functions of
            transformers do: `[batch, queries, heads, head_dim]`, and the weights or None.
    """
    before = [module.__dict__.get(_CORE) for module in modules]
    try:
        for module in modules:
            module.__dict__[_CORE] = core
            bridge(module)
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.__dict__[_CORE] = function
            if function is None:
                del module.__dict__[_CORE]


@contextlib.contextmanager
def fast_attention(model: nn.Module) -> Iterator[None]:
    """Compute a model's attention by the fastest exact way inside the context, and let it take packed batches.

    Forward and backward pass belong into the same context, as checkpointing runs forward passes in the backward one.
    Other models are not affected. Batches that name the borders of their samples (see `PACKED`) get no mask:
    `transformers` would build one of tokens × tokens from the positions. Outside the context it does, unless it makes a
    cache: with `use_cache=False` packed batches are right there too, only slow.
    """
    modules = [] if _FAST in model.__dict__ else attention_modules(model)
    if not modules:
        yield
        return
    backbone: Any = getattr(model, "base_model", model)
    hook = backbone.register_forward_pre_hook(_without_mask, with_kwargs=True)
    model.__dict__[_FAST] = True
    try:
        with core_attention(modules, _computed):
            yield
    finally:
        hook.remove()
        del model.__dict__[_FAST]


def _without_mask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A mask of four dimensions goes through `transformers` as it is; the dispatchers do not look at it."""
    if kwargs.get(BOUNDS) is None or kwargs.get("attention_mask") is not None:
        return None
    return args, {**kwargs, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=kwargs[BOUNDS].device)}


_NAMES = ("query", "key", "value", "attention_mask")  # some models give some of them by name


class _Dispatcher:
    """An attention function that passes the original through the adapters of the module it is called for."""

    def __init__(self, original: Callable[..., Any] | None):
        self.original = original

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # "eager" is not one function: every modelling file brings its own.
        original = self.original or getattr(sys.modules[plain_class(module).__module__], _EAGER)
        core = module.__dict__.get(_CORE)
        run = functools.partial(core or _plainly, module, original)
        args = (*args, *(kwargs.pop(name) for name in _NAMES[len(args) :] if name in kwargs))
        if core is _computed and kwargs.get(BOUNDS) is not None:
            return _packed(module, original, run, *args, **kwargs)
        if kwargs.get(PLACES) is not None:
            raise ConfigError(
                f"The rows of this batch share their opening ({PLACES}), which only this package's attention knows. "
                "Call the model inside adapterlab.engine.attention.fast_attention, or make batches without it: "
                "PackingCollator()."
            )
        if ADAPTERS not in module._modules:
            return run(*args, **kwargs)
        return through("attention", module, run, *args, **kwargs)


def _plainly(module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(module, *args, **kwargs)


def _computed(
    module: nn.Module,
    original: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The attention core itself, by the kernel of this package where that is the same and faster."""
    if mask is None and _is_plain(original, kwargs) and pays(q, k, v):
        return attention(q, k, v, kwargs.get("scaling"), causal=_is_causal(module, kwargs)), None
    return original(module, q, k, v, mask, **kwargs)


def _is_plain(original: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Say whether a call asks for a softmax and nothing else, of all that the `sdpa` function can do."""
    special = ("position_bias", "cache", "softcap")
    return (
        original is sdpa_attention_forward
        and not kwargs.get("dropout")
        and all(kwargs.get(name) is None for name in special)
    )


def _packed(
    module: nn.Module,
    original: Callable[..., Any],
    run: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Attention inside each sample of a packed batch; the mask is the one that hides nothing.

    The batch may say which token's keys and values stand where, so that samples see what they share.
    """
    if mask is not None and mask.numel() > 1:
        raise ConfigError(
            f"{type(module).__name__} makes an attention mask of its own, {list(mask.shape)}, which packed rows would "
            "lose. Set training.packing to false."
        )
    if (places := kwargs.pop(PLACES, None)) is not None:
        k, v = k.index_select(2, places), v.index_select(2, places)
    kinds = _kinds(module, kwargs[BOUNDS])
    if kinds is None:
        return _together(module, original, run, q, k, v, kwargs)
    samples = list(each_segment(q, k, v, kwargs[BOUNDS], kwargs[KEY_BOUNDS]))
    outputs: dict[int, Tensor] = {}
    for around, numbers in kinds:
        parts = [samples[i] for i in numbers]
        if around is None:
            out = _together(module, original, run, *_behind(parts), {**kwargs, **_bounds(parts, q.device)})[0]
            outputs.update(zip(numbers, out.split([part[0].shape[2] for part in parts], 1), strict=True))
        else:
            call = functools.partial(through, "attention", module, run)
            for i, out in zip(numbers, _each(module, call, parts, kwargs, around), strict=True):
                outputs[i] = out
    return torch.cat([outputs[i] for i in range(len(samples))], 1), None


def _together(
    module: nn.Module,
    original: Callable[..., Any],
    run: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Any,
) -> Any:
    """The attention of packed samples without adapters, by the one call that takes them all where there is one."""
    bounds, key_bounds, scale = given[BOUNDS], given[KEY_BOUNDS], given.get("scaling")
    causal = _is_causal(module, given)
    if "flash" in attention_implementation(module):
        return original(module, q, k, v, None, **given)
    if _is_plain(original, given) and pays(q, k, v, bounds):
        return attention(q, k, v, scale, causal=causal, bounds=bounds, key_bounds=key_bounds), None
    if _is_plain(original, given) and varlen_works(q, v):
        longest = given[LONGEST], given[LONGEST_KEYS]
        return varlen_attention(q, k, v, (bounds, key_bounds), longest, scale, causal=causal), None
    outputs = _each(module, run, list(each_segment(q, k, v, bounds, key_bounds)), given, contextlib.nullcontext)
    return torch.cat(outputs, 1), None


_Samples = list[tuple[Tensor, Tensor, Tensor]]
_Around = Callable[[int], contextlib.AbstractContextManager[Any]]


def _each(module: nn.Module, call: Callable[..., Any], samples: _Samples, kwargs: Any, around: _Around) -> list[Tensor]:
    """Attention of samples by themselves, those of one length as rows of one call."""
    # What speaks of the whole batch means nothing to one sample.
    given = {name: value for name, value in kwargs.items() if name not in (*PACKED, "position_ids")}
    causal, found = _is_causal(module, kwargs), list[Tensor]([samples[0][0]] * len(samples))
    rowwise = all(adapter.rowwise for adapter in adapters_of(module).values())
    alike: dict[tuple[int, int], list[int]] = {}
    for i, (q, k, _) in enumerate(samples):
        alike.setdefault((q.shape[2], k.shape[2]) if rowwise else (-i, 0), []).append(i)
    for numbers in alike.values():
        q, k, v = (torch.cat(parts) for parts in zip(*(samples[i] for i in numbers), strict=True))
        with around(len(numbers)):
            out = call(q, k, v, _own_mask(module, q, k, causal), **given)[0]
        for i, row in zip(numbers, out.split(1), strict=True):
            found[i] = row
    return found


def _behind(samples: _Samples) -> tuple[Tensor, Tensor, Tensor]:
    """Samples packed behind each other again."""
    q, k, v = (torch.cat(parts, 2) for parts in zip(*samples, strict=True))
    return q, k, v


def _bounds(samples: _Samples, device: torch.device) -> dict[str, Any]:
    """What a packed batch of these samples is called with."""
    lengths = [[part.shape[2] for part in column] for column in list(zip(*samples, strict=True))[:2]]
    bounds = (torch.tensor([0, *itertools.accumulate(one)], dtype=torch.int32, device=device) for one in lengths)
    return dict(zip(PACKED, (*bounds, *map(max, lengths)), strict=True))


def _kinds(module: nn.Module, bounds: Tensor) -> list[tuple[_Around | None, list[int]]] | None:
    """The packed samples by what stands inside their attention, None being nothing; None where nothing does at all."""
    held: dict[str, Any] = adapters_of(module)
    inside = tuple(name for name, adapter in held.items() if adapter.place == "attention" and not adapter.idle)
    if not inside:
        return None
    state, count = module.__dict__[STATE], len(bounds) - 1
    whole = state.segments
    if whole is None:
        live = any(name in state.active and not held[name].is_merged for name in inside)
        return [(contextlib.nullcontext, list(range(count)))] if live else None
    if not whole.among(inside).used:
        return None
    if whole.by_token and not whole.whole_samples:
        raise AttachError(
            f"A packed sample has several owners, and {type(module).__name__} carries adapters inside its attention, "
            "which see whole samples. Let the segments of host.tokens begin where samples do."
        )
    kinds: dict[Any, list[int]] = {}
    for i, who in enumerate(whole.of_samples(tuple(bounds.tolist()))):
        kinds.setdefault(who, []).append(i)
    found: list[tuple[_Around | None, list[int]]] = []
    for who, numbers in kinds.items():
        plain = not set(inside) & set(names_of(who))
        found.append((None if plain else functools.partial(_showing, state, who), numbers))
    return found


def _showing(state: State, who: Who, count: int) -> contextlib.AbstractContextManager[Any]:
    """Take the batch to be so many rows of one owner."""
    return state.showing(segments([(who, count)]), Batch(count, None, ids=False))


def _own_mask(module: nn.Module, q: Tensor, k: Tensor, causal: bool) -> Tensor | None:
    """The mask that a sample by itself would come with.

    The eager functions know no causality but their mask's, and the others none with more keys than queries.
    """
    if not causal or (attention_implementation(module) != "eager" and q.shape[2] == k.shape[2]):
        return None
    return understood(module, visible(q, k)[None, None], q.dtype)


def prepend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    prefix_k: Tensor,
    prefix_v: Tensor,
    kwargs: dict[str, Any],
    window: int | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """Put keys and values in front of the real ones, visible to every query.

    Without a mask, causality is implied by a flag under which query i sees keys 0 to i (a static cache may have empty
    places behind them), so the causal mask is built before the keys are widened.

    Args:
        module: the attention module.
        q: `[batch, heads, queries, head_dim]`.
        k: `[batch, kv_heads, keys, head_dim]`, heads not yet repeated.
        v: likewise.
        mask: `[batch or 1, heads or 1, queries, keys]`, boolean (true = visible) or additive, or None.
        prefix_k: `[batch or 1, kv_heads, prefix, head_dim]`.
        prefix_v: likewise.
        kwargs: of the attention call; a `position_bias` gets zero columns, or those of positions 0, 1, ... if it is
            linear.
        window: how many keys a query of causal attention sees, itself included, where the prefix counts among them.
        first: position of the first real key, where a linear bias counts from it.

    Returns:
        (keys, values, mask, kwargs) with `prefix` more columns.
    """
    count = prefix_k.shape[2]
    if mask is None and (q.shape[2] > 1 or window) and _is_causal(module, kwargs):
        mask = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril() if q.shape[2] > 1 else mask
        kwargs = {**kwargs, "is_causal": False} if "is_causal" in kwargs else kwargs
    if mask is not None:
        mask = mask[..., : k.shape[2]]
        mask = torch.cat([_in_front(mask, count, window), mask], -1)
    mask = mask if mask is None else understood(module, mask, q.dtype)
    bias = kwargs.get("position_bias")
    if bias is not None:
        front = bias.new_zeros(*bias.shape[:-1], count)
        if kwargs.get(LINEAR):
            places = torch.arange(count, device=bias.device) - first
            front = front + (slopes(bias.shape[1], bias.device)[:, None, None] * places).to(bias.dtype)
        kwargs = {**kwargs, "position_bias": torch.cat([front, bias], -1)}
    k = torch.cat([_as_wide(prefix_k, k).expand(len(k), -1, -1, -1).to(k.dtype), k], 2)
    v = torch.cat([_as_wide(prefix_v, v).expand(len(v), -1, -1, -1).to(v.dtype), v], 2)
    return k, v, mask, kwargs


def _as_wide(prefix: Tensor, t: Tensor) -> Tensor:
    """A prefix with zeros where an adapter further out gave the vectors dimensions of its own."""
    wider = t.shape[-1] - prefix.shape[-1]
    return F.pad(prefix, (0, wider)) if wider else prefix


def _in_front(mask: Tensor, count: int, window: int | None) -> Tensor:
    """The columns of a causal mask `[..., queries, keys]` for keys in front of all."""
    added = mask.dtype != torch.bool
    columns = mask.new_zeros(*mask.shape[:-1], count) if added else mask.new_ones(*mask.shape[:-1], count)
    if window is None:
        return columns
    seen = mask > torch.finfo(mask.dtype).min / 2 if added else mask
    places = torch.arange(mask.shape[-1], device=mask.device)
    last = (seen * places).amax(-1, keepdim=True)  # a query sees itself and nothing behind
    hidden = last + count - places.new_tensor(range(count)) >= window
    return columns.masked_fill(hidden, torch.finfo(mask.dtype).min if added else False)


def understood(module: nn.Module, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask in the form that the module's attention function takes: the eager ones add their mask."""
    if mask.dtype != torch.bool or attention_implementation(module) != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(given if given is not None else getattr(module, "is_causal", True))
