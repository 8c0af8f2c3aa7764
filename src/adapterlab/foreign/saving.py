"""How models are saved by whoever holds them: `save_pretrained`, which Trainer, TRL and sentence-transformers call.

Each class that has its own `save_pretrained` is asked once, for the process, to let us look first: the model that is
saved may be the one that carries adapters, a part of it, or a model around it, so nothing of an instance would do.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from adapterlab.foreign.model import base_modules, unwrapped

_SAVE, _WATCHED = "save_pretrained", "_adapterlab_watched"

# (model, what the class does by itself, folder, arguments that were given beside it)
Answer = Callable[[nn.Module, Callable[[], Any], Path, dict[str, Any]], Any]


def is_saved(model: Any) -> bool:
    """Say whether others save a model through a `save_pretrained` that we see."""
    return hasattr(type(unwrapped(model)), _SAVE)


def watch_saves(model: nn.Module, answer: Answer) -> None:
    """Let `answer` be asked whenever a model of transformers, or one of the classes in this one, is saved.

    What only calls the `save_pretrained` of its parts, as sentence-transformers does, is left as it is.
    """
    # A model of transformers comes with this module, which takes seconds to import and is not needed for others.
    theirs = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    if theirs:
        _watch(theirs, answer)
    for _, module in base_modules(model):
        inner = any(isinstance(m, theirs) for _, m in base_modules(module) if m is not module)
        if is_saved(module) and (isinstance(module, theirs) or not inner):
            _watch(next(cls for cls in type(module).__mro__ if _SAVE in vars(cls)), answer)


def _watch(cls: Any, answer: Answer) -> None:
    plain = vars(cls)[_SAVE]
    if hasattr(plain, _WATCHED):
        return
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def save_pretrained(self: nn.Module, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(self, save_directory, *args, **kwargs).arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        as_before = functools.partial(plain, self, save_directory, *args, **kwargs)
        return answer(self, as_before, Path(save_directory), dict(list(given.items())[2:]))

    setattr(save_pretrained, _WATCHED, True)
    setattr(cls, _SAVE, save_pretrained)
