"""The base under an adapter as a model of its own: what preference training and RL measure their distance from."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from adapterlab.engine.modes import evaluating
from adapterlab.errors import ConfigError
from adapterlab.hosts import host

_OWN = "hooks"  # of the view alone; modules, parameters and buffers are those of the model


def reference_model(model: nn.Module) -> Any:
    """Return a model as it is with every adapter off, to be a trainer's reference; it shares all weights.

        trainer = DPOTrainer(model, al.reference_model(model), args, ...)

    A call computes in eval mode, without gradients and with no adapter live, whatever is live outside. It takes no
    memory of its own. What changes the base's own weights for good (a merge) changes the reference, too.

    Args:
        model: a model with adapters.

    Raises:
        ConfigError: it carries no adapter, so that it would be its own reference.
        AttachError: in a call: an adapter that is live cannot be switched off.
    """
    attached = host(model)
    if attached is None:
        raise ConfigError(
            f"{type(model).__name__} carries no adapter, so it cannot be its own reference. Attach one first, or load "
            "the reference by itself."
        )
    view = copy.copy(model)
    for name, value in vars(model).items():
        if name.endswith(_OWN) and isinstance(value, dict):
            vars(view)[name] = value.copy()
    plain = type(model)
    view.__class__ = type(plain.__name__, (_WithoutAdapters, plain), {"__module__": plain.__module__})
    return view


class _WithoutAdapters:
    """Put before a model's class: calls see the base alone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self
        attached = host(model)
        if attached is None:  # all were detached meanwhile
            with evaluating(model):
                return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with attached.using(), evaluating(model):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
