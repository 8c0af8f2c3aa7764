"""What several methods need on convolutions beside the matrix view of `Site`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapterlab.core.site import Site


def kernel(site: Site) -> tuple[int, ...]:
    """Sizes of the kernel's axes; empty for modules that are no convolutions."""
    module: Any = site.module
    return tuple(module.kernel_size) if site.kind == "conv" else ()


def along_channels(site: Site, values: Tensor) -> Tensor:
    """Shape one value for each output channel `[out]` so that it multiplies an output of the module."""
    return values.view(-1, *[1] * len(kernel(site)))


def pads_otherwise(site: Site) -> bool:
    """Say whether a convolution pads with something else than zeros."""
    module: Any = site.module
    return site.kind == "conv" and module.padding_mode != "zeros" and module.padding != "valid" and any(module.padding)


def tucker(core: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Build kernels from a core and the factors of the channels.

    Args:
        core: `[r, r, *k]`.
        rows: `[r, out]`.
        columns: `[r, in]`.

    Returns:
        `[out, in · prod(k)]`.
    """
    return torch.einsum("ijk,io,jc->ock", core.flatten(2), rows, columns).flatten(1)
