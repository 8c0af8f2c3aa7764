"""Chosen entries of base parameters, trained in place: memory for k entries, not for the whole tensor.

The parameter in the model holds the tuned values, so every other code that reads it sees them. What trains is a
float32 vector of the k values; its gradient is gathered from the dense one, which lives for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.site import Site


class Entries(Adapter):
    """The trained entries of one module's parameters.

    Attributes:
        values: float32 `[k]` for each parameter name.
        index<name>: int64 `[k]`, flat row-major positions in the parameter as it is stored.
    """

    rowwise: ClassVar[bool] = False
    resident: ClassVar[bool] = True

    def __init__(self, site: Site):
        super().__init__(site)
        self.values = nn.ParameterDict()
        self.index = nn.Module()
        self.aliases: dict[str, nn.Parameter] = {}  # not registered: trained and saved where it was made

    def add(self, parameter: str, index: Tensor) -> nn.Parameter:
        """Train these entries of a parameter; they start at their present values."""
        base = self.site.module._parameters[parameter]
        assert base is not None
        index = index.to(base.device, torch.int64).flatten()
        self.index.register_buffer(parameter, index)
        self.values[parameter] = nn.Parameter(base.detach().reshape(-1)[index].float())
        values: nn.Parameter = self.values[parameter]
        return values

    def alias(self, parameter: str, index: Tensor, values: nn.Parameter) -> None:
        """See the entries of a tied parameter through the vector that another module's adapter trains."""
        self.index.register_buffer(parameter, index.to(values.device, torch.int64).flatten(), persistent=False)
        self.aliases[parameter] = values

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module with its parameters seen as functions of the trained vectors."""
        tensors = {
            name: _Placed.apply(self.site.module._parameters[name], values, self.index._buffers[name])
            for name, values in (*self.values.items(), *self.aliases.items())
        }
        with self.site.substituted(**tensors):
            return run(*args, **kwargs)


class _Placed(torch.autograd.Function):
    """The parameter with the values written into it; backward gathers the gradient of the values."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, values: Tensor, index: Tensor) -> Tensor:
        # `data` keeps the version counter: between two forward passes of one step the values are the same, and
        # tensors saved by the first pass stay valid.
        parameter.data.view(-1)[index] = values.detach().to(parameter.dtype)
        ctx.save_for_backward(index)
        ctx.dtype = values.dtype
        return parameter.detach().view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (index,) = ctx.saved_tensors
        return None, grad.reshape(-1)[index].to(ctx.dtype), None
