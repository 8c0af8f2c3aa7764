"""Adapters that change the parameters a module computes with, whatever it does with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adapterlab.core.adapter import Adapter
from adapterlab.engine.wrapping import STATE


class Substitute(Adapter):
    """Run a module with other values in place of some of its parameters.

    Kept by autograd, the values of all layers would take as much memory as the model: the module runs again in the
    backward pass instead, with values made anew.

    Attributes:
        names: of the parameters.
    """

    names: tuple[str, ...] = ()

    def values(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make the new values, in the shapes and dtypes of the present ones."""
        raise NotImplementedError

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module with the new values; a compiler decides by itself what to keep."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self._run(run, *args, **kwargs)
        state = self.site.module.__dict__[STATE]

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), state.replay(state.snapshot())

        return checkpoint(self._run, run, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    def _run(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        present: Any = self.site.module._parameters
        with self.site.substituted(**self.values({name: present[name] for name in self.names})):
            return run(*args, **kwargs)
