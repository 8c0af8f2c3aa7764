"""Class swap in place + continuation: how a module learns to call its adapters.

The module keeps its name, its weight, its base state-dict keys and every `isinstance`; only its class becomes a
subclass whose forward passes the rest of the computation, `run`, through the adapters attached to it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from adapterlab.core.adapter import RESTING, Adapter
from adapterlab.core.composition import entered
from adapterlab.core.site import is_plain_linear
from adapterlab.core.state import State
from adapterlab.engine.fusion import Base, computed
from adapterlab.engine.mixed_batch import mixed
from adapterlab.engine.resting import at_rest
from adapterlab.foreign.model import ADAPTERS, PLAIN, plain_class
from adapterlab.foreign.written_attention import written_out

HOST, STATE = "_adapterlab_host", "_adapterlab_state"  # attributes: of the model, and of every wrapped module
_TAKES = "_adapterlab_takes"  # attribute of a wrapped class: what its signature names beside its own
_WRITTEN = "_adapterlab_written"  # likewise: its forward in the form of `foreign.written_attention`, or None


def dispatch(module: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module's own computation through its live adapters; attached first means innermost."""
    written: Any = getattr(type(module), _WRITTEN, None)
    if written is not None and any(a.place == "attention" for a in adapters_of(module).values()):
        run = functools.partial(written, module, functools.partial(through, "attention", module))
    return through("call", module, run, *args, **kwargs)


def through(place: str, module: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `run` through the live adapters of a module that stand at one place (`call` or `attention`)."""
    state = module.__dict__[STATE]
    held: Any = module._modules[ADAPTERS]._modules  # type: ignore[union-attr]
    if state.segments is not None:
        return mixed(held, place, state, run, *args, **kwargs)
    if state.together is not None:
        return entered(state.together, run, functools.partial(_live, held, place))(*args, **kwargs)
    # Many may be attached where few are live.
    active = state.active if len(state.active) < 2 else [name for name in held if name in state.active]
    found = [held[name] for name in active if name in held]
    live = [a for a in found if a.place == place and not (a.is_merged or a.idle)]
    for adapter in live:
        run = functools.partial(_around(adapter), run)
    return run(*args, **kwargs)


def _live(held: Any, place: str, name: str) -> Callable[..., Any] | None:
    adapter = held.get(name)
    out_of_it = adapter is None or adapter.place != place or adapter.is_merged or adapter.idle
    return None if out_of_it else _around(adapter)


def _around(adapter: Any) -> Callable[..., Any]:
    """Return how an adapter is computed, with its tensors fetched first when accelerate keeps them elsewhere.

    accelerate's hook stands around `forward`, which `around` does not go through.
    """
    hook = adapter.__dict__.get("_hf_hook")
    if hook is None:
        return functools.partial(computed, adapter)

    def fetched(*args: Any, **kwargs: Any) -> Any:
        hook.pre_forward(adapter)
        try:
            return computed(adapter, *args, **kwargs)
        finally:
            hook.post_forward(adapter, None)

    return fetched


@functools.cache
def wrapped(cls: Any, takes: tuple[str, ...] = ()) -> type[nn.Module]:
    """Return the subclass of `cls` that consults adapters.

    It has the name and the forward signature of `cls`, because `save_pretrained` writes the name into the config
    and `Trainer` reads the signature to decide which columns of a dataset to keep; what adapters take is added to it.
    """
    plain, linear = cls.forward, is_plain_linear(cls)

    def usual(self: nn.Module, state: State, args: Any, kwargs: Any) -> Any:
        if linear and len(args) == 1 and not kwargs and (y := at_rest(self, state, args[0])) is not None:
            return y
        return dispatch(self, Base(plain, self), *args, **kwargs)

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if ADAPTERS not in self._modules:  # a hook set in between still holds this method after a detach
            return plain(self, *args, **kwargs)
        state = self.__dict__[STATE]
        if state.products is not None:
            return state.products.computed(state, self, args, kwargs, plain, usual)
        return usual(self, state, args, kwargs)

    if takes:
        forward.__signature__ = _with(inspect.signature(plain), takes)  # type: ignore[attr-defined]

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # A class made at run time cannot be imported by name: pickle the plain class and swap again on loading.
        _, _, *rest = super(made, self).__reduce_ex__(protocol)
        return (_rebuild, (cls, takes), *rest)

    namespace = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        PLAIN: cls,
        _TAKES: takes,
        _WRITTEN: written_out(cls),
    }
    made: Any = type(cls.__name__, (cls,), namespace)
    return made


def _rebuild(cls: Any, takes: tuple[str, ...] = ()) -> nn.Module:
    made: Any = wrapped(cls, takes)
    return made.__new__(made)


def _with(signature: inspect.Signature, names: tuple[str, ...]) -> inspect.Signature:
    """A signature with further arguments, in front of the one that collects all others."""
    own = list(signature.parameters.values())
    added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in names]
    added = [parameter for parameter in added if parameter.name not in signature.parameters]
    collects = bool(own) and own[-1].kind is inspect.Parameter.VAR_KEYWORD
    return signature.replace(parameters=[*own[:-1], *added, own[-1]] if collects else [*own, *added])


def _show(module: nn.Module) -> None:
    """Let the signature of a wrapped module name what its adapters take."""
    names = tuple(sorted({name for adapter in adapters_of(module).values() for name in adapter.takes}))
    if getattr(type(module), _TAKES, ()) == names:
        return
    module.__class__ = wrapped(plain_class(module), names)
    patched = module.__dict__.get("forward")  # accelerate's, which speaks of the forward that it found
    if isinstance(patched, functools.partial):
        patched.__dict__.pop("__signature__", None)
        if names:
            patched.__signature__ = _with(inspect.signature(patched), names)  # type: ignore[attr-defined]


def adapters_of(module: nn.Module) -> dict[str, Adapter]:
    """Return the adapters of a module by name, in order of attachment."""
    held = module._modules.get(ADAPTERS)
    return dict(held._modules) if held is not None else {}  # type: ignore[arg-type]


def put(module: nn.Module, name: str, adapter: Adapter, state: State) -> None:
    """Attach an adapter to a module, wrapping the module if it is not wrapped yet."""
    if ADAPTERS not in module._modules:
        module.add_module(ADAPTERS, nn.ModuleDict())
        module.__dict__[STATE] = state
        cls: Any = type(module)
        module.__class__ = wrapped(cls)
        _rebind(module)
        if adapter.site.overtaken:
            module.register_forward_pre_hook(_watched)
    module._modules[ADAPTERS].add_module(name, adapter)  # type: ignore[union-attr]
    module.__dict__.pop(RESTING, None)
    _show(module)


def _watched(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: where one stands, torch leaves the fast paths that call no submodule."""


def take(module: nn.Module, name: str) -> None:
    """Remove an adapter; the last one restores the module's class and attributes."""
    held = module._modules[ADAPTERS]
    del held._modules[name]  # type: ignore[union-attr]
    module.__dict__.pop(RESTING, None)
    if not held._modules:  # type: ignore[union-attr]
        del module._modules[ADAPTERS]
        del module.__dict__[STATE]
        module.__class__ = plain_class(module)
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _watched]:
            del hooks[key]
        _unbind(module)
        getattr(module.__dict__.get("forward"), "__dict__", {}).pop("__signature__", None)
    else:
        _show(module)


def plain_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module without the adapters it may carry."""
    bare = copy.copy(module)
    bare.__class__ = plain_class(module)
    bare.__dict__ = {key: value for key, value in module.__dict__.items() if key not in (STATE, RESTING)}
    bare.__dict__["_modules"] = {key: child for key, child in module._modules.items() if key != ADAPTERS}
    return copy.deepcopy(bare)


def _rebind(module: nn.Module) -> None:
    """Reach modules whose `forward` was patched on the instance, which hides the swapped class.

    accelerate's hooks keep the forward they replaced in `_old_forward`; adapters go inside, where the hook has
    already brought the weights to their device. Any other patch is called as the innermost computation.
    """
    for slot in ("_old_forward", "forward"):
        inner = module.__dict__.get(slot)
        if inner is not None:
            bound = functools.partial(dispatch, module, inner)
            module.__dict__[slot] = functools.update_wrapper(bound, inner)
            return


def _unbind(module: nn.Module) -> None:
    for slot in ("_old_forward", "forward"):
        bound = module.__dict__.get(slot)
        if isinstance(bound, functools.partial) and bound.func is dispatch:
            module.__dict__[slot] = bound.args[1]
            if slot == "forward" and getattr(bound.args[1], "__func__", None) is plain_class(module).forward:
                del module.__dict__[slot]  # a hook that was removed meanwhile left the plain method here
