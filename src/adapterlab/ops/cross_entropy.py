"""Cross-entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, noop_context_fn

CHUNK_ELEMENTS = 2**23  # logits alive at a time; in float32 that is 32 MB, and larger chunks are no faster


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Sum of −log softmax(h Wᵀ + bias)[label] over positions, with a frozen W.

    Logits exist for one chunk of positions at a time. Because W is frozen, the gradient of the hidden states is
    formed in the forward pass, and only it is kept: memory is linear in positions and independent of the vocabulary.

    Args:
        hidden: `[positions, width]`.
        weight: `[vocabulary, width]`; gets no gradient.
        bias: `[vocabulary]` or None; gets no gradient.
        labels: `[positions]`, none of them ignored.

    Returns:
        A float32 scalar.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels)
    return loss


def module_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    vocabulary: int,
    context_fn: Callable[[], tuple[Any, Any]] = noop_context_fn,
) -> Tensor:
    """The same sum through any head, adapted or trainable: chunks are recomputed in the backward pass.

    Args:
        hidden: `[positions, width]`.
        head: maps hidden states to logits `[..., vocabulary]`.
        labels: `[positions]`.
        vocabulary: number of logits, for the size of a chunk.
        context_fn: contexts for the first computation and the second, for a head that consults changing state.
    """

    def part(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(h).float(), y, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for rows in _chunks(len(hidden), vocabulary):
        h, y = hidden[rows], labels[rows]
        if torch.is_grad_enabled():
            total = total + checkpoint(part, h, y, use_reentrant=False, context_fn=context_fn)
        else:
            total = total + part(h, y)
    return total


def _chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return (slice(start, start + size) for start in range(0, positions, size))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        need = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if need else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows in _chunks(len(hidden), weight.shape[0]):
            logits = F.linear(hidden[rows], weight, bias).float()
            target = labels[rows, None]
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(1, target)).sum()
            if grad is not None:
                p = logits.sub_(norm).exp_()
                p.scatter_add_(1, target, p.new_full((len(target), 1), -1.0))
                torch.mm(p.to(weight.dtype), weight, out=grad[rows])
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * scale.to(grad.dtype), None, None, None
