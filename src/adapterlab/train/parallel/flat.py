"""Talk among processes about many small tensors in few large pieces: a call costs the same whatever it carries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

BUCKET = 25 * 2**20  # bytes of a piece; larger ones are no faster, and cost as much memory beside the tensors


def buckets(tensors: Sequence[Tensor], size: int = BUCKET) -> Iterator[list[int]]:
    """Yield which tensors make a piece: of one dtype and device, at most so many bytes unless one alone has more."""
    alike: dict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        alike[tensor.dtype, tensor.device].append(i)
    for chosen in alike.values():
        piece: list[int] = []
        held = 0
        for i in chosen:
            if piece and held + tensors[i].nbytes > size:
                yield piece
                piece, held = [], 0
            piece.append(i)
            held += tensors[i].nbytes
        yield piece


def add_up(tensors: Sequence[Tensor]) -> None:
    """Put the sums of tensors over all processes in their place; beside them there is never more than a piece."""
    _together(tensors, dist.all_reduce)


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Give tensors the values that the first process has."""
    plain = [tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor for tensor in tensors]
    _together(plain, lambda flat: dist.broadcast(flat, 0))


@torch.no_grad()
def _together(tensors: Sequence[Tensor], talk: Callable[[Tensor], object]) -> None:
    for piece in buckets(tensors):
        alone = len(piece) == 1 and tensors[piece[0]].is_contiguous()
        flat = tensors[piece[0]] if alone else torch.cat([tensors[i].reshape(-1) for i in piece])
        talk(flat)
        if alone:
            continue
        parts = flat.split([tensors[i].numel() for i in piece])
        for i, part in zip(piece, parts, strict=True):
            tensors[i].copy_(part.view(tensors[i].shape))
