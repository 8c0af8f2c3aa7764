"""Block-wise quantization to codes that suit normally distributed weights, as what it unpacks to."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_TAIL = 0.9677083  # 1 − ½ (1/32 + 1/30): the outermost quantile of NF4


@functools.cache
def codes(bits: int) -> Tensor:
    """The 2^bits values between -1 and 1: normal quantiles, one more on the positive side, and zero."""
    half = 2 ** (bits - 1)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    positive = normal.icdf(torch.linspace(_TAIL, 0.5, half + 1, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(_TAIL, 0.5, half, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return (values / values.max()).float()


def quantized(weight: Tensor, bits: int, block: int) -> Tensor:
    """Round each block of a weight to the nearest codes times its largest absolute value.

    Args:
        weight: any shape; blocks run along it flattened in row-major order, the last one may be shorter.
        bits: of a code.
        block: entries that share a scale.

    Returns:
        Shape and dtype of `weight`.
    """
    table = codes(bits).to(weight.device, weight.dtype)
    flat = weight.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scale = blocks.abs().amax(1, keepdim=True)
    shares = blocks / torch.where(scale > 0, scale, 1)
    nearest = torch.bucketize(shares, (table[1:] + table[:-1]) / 2)  # a tie goes to the lower code
    return (table[nearest] * scale).view(-1)[: len(flat)].view_as(weight)
