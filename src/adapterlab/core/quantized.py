"""Dense views of base weights that a library keeps packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_quantized(module: nn.Module) -> bool:
    """Say whether the module's weight is stored packed (bitsandbytes, torchao) instead of as plain numbers."""
    weight = module._parameters.get("weight")
    if weight is None:
        return False
    return type(weight.data) is not Tensor or not weight.dtype.is_floating_point


def dense(module: nn.Module) -> Tensor:
    """Return the module's weight as plain numbers, in the shape its formula uses.

    Args:
        module: any linear or embedding module, quantized or not.

    Raises:
        TypeError: the storage is of an unknown kind.
    """
    weight = module._parameters["weight"]
    if not is_quantized(module):
        return weight.detach()
    kind = type(weight).__name__
    if kind == "Params4bit":
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        import bitsandbytes.functional as bnb

        scale = weight.SCB if weight.SCB is not None else module.state.SCB
        return bnb.int8_vectorwise_dequant(weight.data, scale)
    if hasattr(weight, "dequantize"):
        return weight.dequantize().detach()
    raise TypeError(f"cannot read a weight stored as {kind} ({weight.dtype}) in {type(module).__name__}")


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of the numbers the module computes with (for packed weights: what they unpack to)."""
    weight = module._parameters.get("weight")
    if weight is None:
        return torch.get_default_dtype()
    if not is_quantized(module):
        return weight.dtype
    state = getattr(weight, "quant_state", None)
    return state.dtype if state is not None else torch.float16
