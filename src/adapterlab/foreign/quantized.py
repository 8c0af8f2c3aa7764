"""Dense views of base weights that a library keeps packed."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from adapterlab.foreign.private_torch import FakeTensor


def is_quantized(module: nn.Module) -> bool:
    """Say whether the module's weight is stored packed (bitsandbytes, torchao) instead of as plain numbers."""
    weight = module._parameters.get("weight")
    if weight is None:
        return False
    plain = weight.dtype.is_floating_point and weight.dtype.itemsize > 1  # 8-bit floats need a scale kept elsewhere
    return packed_tensor(module) or not plain


def packed_tensor(module: nn.Module) -> bool:
    """Say whether the weight unpacks itself (torchao), so that an ordinary module computes with it."""
    weight = module._parameters.get("weight")
    return weight is not None and not is_plain(weight)


def is_plain(tensor: Tensor) -> bool:
    """Say whether a tensor holds its numbers as they are; one without contents, made for planning, stands for such."""
    if type(tensor) in (Tensor, nn.Parameter):
        return True
    kind = type(tensor.data)
    return kind is Tensor or issubclass(kind, FakeTensor)


def dense(module: nn.Module) -> Tensor:
    """Return the module's weight as plain numbers, in the shape its formula uses.

    Args:
        module: any linear or embedding module, quantized or not.

    Raises:
        TypeError: the storage is of an unknown kind.
    """
    weight: Any = module._parameters["weight"]
    if not is_quantized(module):
        return weight.detach()
    kind = getattr(weight, "packing", type(weight).__name__)  # tensors without contents have no class of their own
    if kind == "Params4bit":
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        import bitsandbytes.functional as bnb

        state: Any = module.state
        scale = weight.SCB if weight.SCB is not None else state.SCB
        return bnb.int8_vectorwise_dequant(weight.data, scale)
    if packed_tensor(module):  # a plain tensor has `dequantize` too, which takes the packed codes for numbers
        return weight.dequantize().detach()
    raise TypeError(f"cannot read a weight stored as {kind} ({weight.dtype}) in {type(module).__name__}")


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of the numbers the module computes with (for packed weights: what they unpack to).

    For a block without a weight of its own it is that of the first plain parameter inside.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        inside = (p.dtype for p in module.parameters() if p.is_floating_point())
        return next(inside, torch.get_default_dtype())
    if packed_tensor(module) or not is_quantized(module):
        return weight.dtype
    state = getattr(weight, "quant_state", None)
    return state.dtype if state is not None else torch.float16


_WEIGHT_ONLY = ("Int8Tensor", "IntxUnpackedToInt8Tensor")


def unpacks_in_training(module: nn.Module, dtype: torch.dtype) -> bool:
    """Say whether the library, when it trains, does nothing but a product with the unpacked weight in this dtype.

    Layers that round their inputs as well (bitsandbytes' int8, torchao's dynamic ones) compute something else.
    """
    weight: Any = module._parameters["weight"]
    if type(weight).__name__ == "Params4bit":
        return getattr(module, "compute_dtype", None) in (None, dtype)
    inputs = ("act_quant_kwargs", "act_pre_scale", "activation_quantization")
    return type(weight).__name__ in _WEIGHT_ONLY and all(getattr(weight, name, None) is None for name in inputs)


def stops_gradient(module: nn.Module) -> bool:
    """Say whether the module gives its input no gradient: torchao's layers that round their input too do not."""
    weight: Any = module._parameters.get("weight")
    if not isinstance(module, nn.Linear) or not type(weight).__module__.startswith("torchao"):
        return False
    with torch.enable_grad():
        x = torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device, requires_grad=True)
        return not nn.functional.linear(x, weight).requires_grad


def misread(model: nn.Module) -> str:
    """Say why the numbers of a model's 4-bit weights would be wrong on this machine, or "".

    On CPUs with AVX-512 the kernel of bitsandbytes 0.50.2 takes each row of a weight for whole blocks. Where a block
    reaches over the end of a row, nearly all numbers get the scale of another block.
    """
    for path, module in model.named_modules():
        weight: Any = module._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        if state is None or weight.device.type != "cpu" or type(weight).__name__ != "Params4bit":
            continue
        row, block = state.shape[-1], state.blocksize
        if row % block and not _unpacks(row, block, state.quant_type):
            return (
                f"{path} is stored in 4 bits in blocks of {block} along rows of {row}, and the "
                "installed bitsandbytes unpacks such weights wrongly on this CPU: only rows of whole blocks come out "
                f"right. Load the model without quantization, use a GPU, or leave {path.rpartition('.')[2]} out of the "
                "quantization (llm_int8_skip_modules)."
            )
    return ""


@functools.cache
def _unpacks(row: int, block: int, kind: str) -> bool:
    """Try it on a few rows in which each block has a scale of its own."""
    import bitsandbytes.functional as bnb

    count = -(-4 * block // row) * row
    weight = (1.0 + torch.arange(count) // block).view(-1, row)
    packed, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=kind)
    return torch.equal(bnb.dequantize_4bit(packed, state), weight)


def keep_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from laying 4-bit weights out anew for inference, and undo it where it has happened.

    On CPUs with bfloat16 instructions the first forward pass in eval mode does so. The new layout has no gradient with
    respect to the input, is not what dequantization expects, and rounds the scales.
    """
    for module in model.modules():
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if "support_avx512bf16_for_cpu" in module.__dict__:
            module.__dict__["support_avx512bf16_for_cpu"] = False
        if getattr(state, "packing_format_for_cpu", False):
            import bitsandbytes.functional as bnb

            weight: Any = module._parameters["weight"]
            weight.data, state = bnb._convert_weight_packed_for_cpu_inverse(weight.data, state)
            if not state.nested:
                state.absmax = state.absmax.T.reshape(-1).float()  # the inverse forgets the scales
