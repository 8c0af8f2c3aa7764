"""What runs at one module: the whole contract is `around`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapterlab.core.site import Site


class Adapter(nn.Module):
    """The trainable part at one site.

    Attributes:
        linear: the adapted module is still linear in its input, so it can be merged.
        rowwise: row i of the output depends on row i of the input only, so adapters can be mixed in a batch.
        site: where it is attached.
    """

    linear: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True

    def __init__(self, site: Site):
        super().__init__()
        self.site = site

    @property
    def dtype(self) -> torch.dtype:
        """Dtype the adapter computes in: that of its first parameter."""
        return next(self.parameters()).dtype

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the adapted module.

        Args:
            run: the rest of the computation: adapters attached earlier, then the module itself. May be called with
                other arguments, several times, or not at all.
            args: what the module was called with.
            kwargs: likewise.
        """
        raise NotImplementedError


class Delta(Adapter):
    """An adapter that adds a matrix to the weight: y = run(x) + op(x, ΔW)."""

    def delta(self) -> Tensor:
        """The update ΔW `[out, in]`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The update's share of the output; override it with a cheaper factored form."""
        return self.site.op(x, self.delta())

    def around(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = run(x, *args, **kwargs)
        return y + self(x.to(self.dtype) if x.is_floating_point() else x).to(y.dtype)


class Copy(Adapter):
    """A full trainable copy of a module, used instead of it (what HF PEFT calls `modules_to_save`).

    The copy leaves a tensor that the base shares with another module untouched, and each adapter can bring its own.
    """

    def __init__(self, site: Site, copy: nn.Module):
        super().__init__(site)
        self.copy = copy.to(site.dtype).requires_grad_(True)

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        moved = [a.to(self.dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        y = self.copy(*moved, **kwargs)
        given = next((a for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
        outside = given.dtype if given is not None else self.site_dtype
        return y.to(outside) if isinstance(y, Tensor) else y

    @property
    def site_dtype(self) -> torch.dtype:
        """Dtype the base module answers in."""
        return next(self.site.module.parameters()).dtype
