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
    here = {key: part for key, tensor in floating.items() if (part := local(tensor)).numel()}
    ends: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in here.values():
        ends.setdefault((tensor.dtype, tensor.device), []).extend(_ends(tensor))
    if all(torch.isfinite(torch.stack(each)).all() for each in ends.values()):  # asked once, not for each tensor
        return None
    return next(key for key, tensor in here.items() if not torch.isfinite(torch.stack(_ends(tensor))).all())


def _ends(tensor: Tensor) -> tuple[Tensor, ...]:
    """Two numbers of a tensor that are finite if all are; NaN wins against every number."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    elif tensor.itemsize == 1:  # it has no order in torch
        tensor = tensor.to(torch.float32)
    return torch.aminmax(tensor)
