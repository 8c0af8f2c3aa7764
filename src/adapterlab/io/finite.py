"""Values that are not finite: never saved, never loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adapterlab.foreign.sharding import local


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name the first tensor that holds NaN or an infinity; None when all are finite. One pass, without copies.

    Of tensors that are split among processes it looks at the part that is here.
    """
    floating = {key: t for key, t in tensors.items() if t.is_floating_point() or t.is_complex()}
    here = {key: local(tensor) for key, tensor in floating.items()}
    return next((key for key, tensor in here.items() if tensor.numel() and not _finite(tensor)), None)


def _finite(tensor: Tensor) -> bool:
    if tensor.is_complex() or tensor.itemsize == 1:  # neither has an order in torch
        return bool(torch.isfinite(tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)).all())
    ends = torch.stack(torch.aminmax(tensor))  # NaN wins against every number
    return bool(torch.isfinite(ends).all())
