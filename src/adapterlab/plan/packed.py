"""Linear layers of bitsandbytes whose packed weights have no contents."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adapterlab.foreign.model import output_head
from adapterlab.foreign.private_torch import unset_fake_temporarily
from adapterlab.foreign.private_transformers import kept_in_float32

BLOCK, OUTER = 64, 256  # entries that share a scale, and scales that share one


def pack(model: Any, kind: str, dtype: torch.dtype) -> None:
    """Replace the linear layers that would be quantized on loading: all but the output head.

    Args:
        model: with weights without contents.
        kind: "nf4" or "int8".
        dtype: of the products.
    """
    head = output_head(model)
    left_out = kept_in_float32(model)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head and not path.endswith(left_out or ("\0",)):
            parent, _, leaf = path.rpartition(".")
            made = _nf4(module, dtype) if kind == "nf4" else _int8(module)
            made.bias = module.bias
            model.get_submodule(parent)._modules[leaf] = made.train(module.training)


def _nf4(linear: nn.Linear, dtype: torch.dtype) -> Any:
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    with unset_fake_temporarily(), torch.device("meta"):
        made = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
        )
    made.support_avx512bf16_for_cpu = False
    count = linear.weight.numel()
    scales = -(-count // BLOCK)
    outer = QuantState(
        absmax=torch.empty(-(-scales // OUTER)), code=torch.empty(256), blocksize=OUTER, dtype=torch.float32
    )
    state = QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8),
        shape=linear.weight.shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=outer,
    )
    weight = _parameter("Params4bit", torch.empty((count + 1) // 2, 1, dtype=torch.uint8))
    weight.quant_state = made.quant_state = state
    made._parameters["weight"] = weight
    return made


def _int8(linear: nn.Linear) -> Any:
    import bitsandbytes as bnb

    with unset_fake_temporarily(), torch.device("meta"):
        made: Any = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    weight = _parameter("Int8Params", torch.empty(linear.weight.shape, dtype=torch.int8))
    weight.CB, weight.SCB = weight.data, torch.empty(linear.out_features)
    made._parameters["weight"] = weight
    return made


def _parameter(kind: str, packed: torch.Tensor) -> Any:
    """A parameter that says how it is packed, as its class cannot."""
    parameter: Any = nn.Parameter(packed, requires_grad=False)
    parameter.packing = kind
    return parameter
