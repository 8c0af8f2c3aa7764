"""Rotations as HF PEFT stores them: whole matrices or the part above the diagonal, in either direction, by version."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from adapterlab.core.site import Site
from adapterlab.errors import FormatError
from adapterlab.methods.multiplicative._rotations import above

Made = tuple[dict[str, Any], dict[str, dict[str, Tensor]]]

# What stands in a configuration of block rotations beside the fields with a name of their own.
READ = ("coft", "eps")


def version(config: Mapping[str, Any]) -> tuple[int, int]:
    """Major and minor version of PEFT that wrote a configuration; they name it from 0.18 on, so (0, 0) before."""
    found = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def derived(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a block rotation that PEFT says by several options or by its version.

    Raises:
        FormatError: a version before 0.14, which rotated something else, or a constraint in the units of 0.15.
    """
    bound = config.get("eps", 6e-5) if config.get("coft") else None
    if "use_cayley_neumann" in config:
        return {"eps": bound, "uneven": "nearest"}
    if "oft_block_size" not in config:
        raise FormatError(
            "This OFT adapter was written by PEFT 0.13 or earlier, which rotated the outputs of a layer; since 0.14 "
            "its inputs are rotated, and neither is a case of the other. Merge it with that version, or train it again."
        )
    if bound is not None:
        raise FormatError(
            "This OFT adapter was written by PEFT 0.14 or 0.15 with coft=true, whose eps counts in units of each "
            "layer's squared block size and bounds another norm. Set coft to false in its adapter_config.json to "
            "load the rotations as they are, without a constraint."
        )
    return {"rescale": True, "uneven": "nearest"}


def outward(turned: bool, options: Mapping[str, Any]) -> Callable[[Any, Mapping[str, Any]], Made | None]:
    """Return what writes block rotations for PEFT.

    Args:
        turned: PEFT's R is the transpose of ours for equal tensors; the opposite tensors give ours.
        options: further ones.
    """

    def write(method: Any, layers: Mapping[str, Any]) -> Made | None:
        if method.rescale:
            return None  # PEFT left the factors of outputs out in 0.16
        bound = {"coft": method.eps is not None, **({} if method.eps is None else {"eps": method.eps})}
        size = {"oft_block_size": 0} if method.blocks else {}
        tensors = {path: {"v": -layer.v if turned else layer.v} for path, layer in layers.items()}
        return {**options, **bound, **size}, tensors

    return write


def inward(turned: bool) -> Callable[[Any, Site, dict[str, Tensor]], dict[str, Tensor]]:
    """Return what reads one module: the present form, or the whole matrices and factors of 0.14 and 0.15."""

    def read(method: Any, site: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {"v": -tensors["v"] if turned else tensors["v"]} if "v" in tensors else {}
        if "matrix" in tensors:
            found["v"] = from_matrix(tensors["matrix"])
        if "scale" in tensors:
            found["s"] = tensors["scale"].flatten()
        return found

    return read


def from_matrix(m: Tensor) -> Tensor:
    """V of PEFT's R = (I − S)(I + S)⁻¹ with S = ½ (M − Mᵀ), for M `[..., b, b]`: ours is that of Q = −S."""
    return above(0.5 * (m.mT - m))
