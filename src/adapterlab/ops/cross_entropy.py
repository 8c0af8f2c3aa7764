"""Cross-entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, noop_context_fn

from adapterlab.ops.operator import operator

IGNORED = -100  # a label that bears no loss
CHUNK_ELEMENTS = 2**24  # logits alive at a time; in bf16 that is 32 MB, and larger chunks are no faster
BLOCK_ELEMENTS = 2**19  # logits of a chunk that a CPU works on at a time, in float32: they stay in its cache


class TokenForm(NamedTuple):
    """What one token's loss is, given the output u of the head and the label y.

    With z = cap · tanh(scale · u / cap), or scale · u without a cap, the loss is
    (1 − smoothing) · (lse − z[y]) + smoothing · (lse − mean(z)) + z_loss · lse², where lse = log Σ exp z.
    The smoothed term is that of `torch.nn.functional.cross_entropy`.

    Attributes:
        scale: factor of the logits.
        cap: bound that the logits approach; None: unbounded.
        smoothing: share of the target that is spread evenly over the vocabulary.
        z_loss: coefficient of lse².
    """

    scale: float = 1.0
    cap: float | None = None
    smoothing: float = 0.0
    z_loss: float = 0.0


PLAIN = TokenForm()


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, form: TokenForm = PLAIN
) -> Tensor:
    """Sum of the token losses of u = h Wᵀ + bias over positions.

    Logits exist for one chunk of positions at a time. All gradients are formed in the forward pass, and only they are
    kept: memory is linear in positions, and of the vocabulary it holds no more than the gradients of W and bias, if
    those train. Gradients of W and bias are summed over chunks in float32.

    Args:
        hidden: `[positions, width]`.
        weight: `[vocabulary, width]`, in the dtype of `hidden`.
        bias: `[vocabulary]` or None.
        labels: `[positions]`; −100 bears no loss.
        form: the loss of one token.

    Returns:
        A float32 scalar; float64 for float64 input.
    """
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, form, needs)
    return loss


def logits_cross_entropy(logits: Tensor, labels: Tensor, form: TokenForm = PLAIN) -> Tensor:
    """Sum of the token losses of given head outputs.

    Args:
        logits: `[positions, vocabulary]`.
        labels: `[positions]`; −100 bears no loss.
        form: the loss of one token.

    Returns:
        A float32 scalar; float64 for float64 input.
    """
    need = torch.is_grad_enabled() and logits.requires_grad
    loss: Tensor = _LogitsCrossEntropy.apply(logits, labels, form, need)
    return loss


def module_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    vocabulary: int,
    context_fn: Callable[[], tuple[Any, Any]] = noop_context_fn,
    form: TokenForm = PLAIN,
    around: Callable[[slice], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Tensor:
    """The same sum through any head: chunks are recomputed in the backward pass.

    Args:
        hidden: `[positions, width]`.
        head: maps hidden states to `[..., vocabulary]`.
        labels: `[positions]`; −100 bears no loss.
        vocabulary: number of logits, for the size of a chunk.
        context_fn: contexts for the first computation and the second, for a head that consults changing state.
        form: the loss of one token.
        around: makes the context in which the head is given these positions.

    Returns:
        A float32 scalar; float64 for float64 input.
    """

    def part(h: Tensor, y: Tensor, rows: slice) -> Tensor:
        with around(rows):
            logits = head(h)
            return logits_cross_entropy(logits, y.to(logits.device), form).to(h.device)

    total = hidden.new_zeros((), dtype=_exact(hidden.dtype))
    for rows in _chunks(len(hidden), vocabulary):
        h, y = hidden[rows], labels[rows]
        if torch.is_grad_enabled():
            total = total + checkpoint(part, h, y, rows, use_reentrant=False, context_fn=context_fn)
        else:
            total = total + part(h, y, rows)
    return total


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and probabilities."""
    return torch.promote_types(dtype, torch.float32)


def _chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Parts of the positions; one empty part when there are none, so that gradients are zeros and not missing."""
    return slices(max(1, positions), max(1, CHUNK_ELEMENTS // vocabulary))


def slices(total: int, size: int) -> Iterator[slice]:
    """Parts that are worked on one after the other; they are alike, so that a simulation may leave some out."""
    return (slice(start, start + size) for start in range(0, total, max(1, size)))


def block_rows(logits: Tensor) -> int:
    """Rows of a chunk that are worked on at a time: all, but on a CPU."""
    if logits.device.type != "cpu":
        return len(logits)
    return max(torch.get_num_threads(), BLOCK_ELEMENTS // logits.shape[1])  # softmax shares rows among threads


# ---------------------------------------------------------------------- from logits to losses and gradients


def _token_losses(logits: Tensor, labels: Tensor, form: TokenForm, grad: Tensor | None) -> Tensor:
    """Return the sum of a chunk's token losses; its gradient goes into `grad`, which may be `logits` itself."""
    rows, vocabulary = logits.shape
    size = block_rows(logits)
    dtype = _exact(logits.dtype)
    z, p = (logits.new_empty((min(size, rows), vocabulary), dtype=dtype) for _ in range(2))
    total = logits.new_zeros((), dtype=dtype)
    for block in slices(rows, size):
        n = len(labels[block])
        z[:n].copy_(logits[block])
        total += _block(z[:n], labels[block], form, p[:n], None if grad is None else grad[block])
    return total


def _block(z: Tensor, labels: Tensor, form: TokenForm, p: Tensor, grad: Tensor | None) -> Tensor:
    """The same for a few rows of head outputs in `z`, which is overwritten, with `p` for probabilities."""
    if form.cap is not None:
        z.mul_(form.scale / form.cap).tanh_().mul_(form.cap)
    elif form.scale != 1:
        z.mul_(form.scale)
    target = labels[:, None].clamp(min=0)
    ignored = (labels == IGNORED)[:, None]
    top = z.amax(-1, keepdim=True)
    torch.softmax(z, -1, out=p)
    spread = p.amax(-1, keepdim=True).log_().neg_()  # lse − top, without another pass of exponentials
    lse = top + spread
    losses = (top - z.gather(1, target)) * (1 - form.smoothing) + spread  # differences first: both can be large
    if form.smoothing:
        losses += form.smoothing * (top - z.mean(-1, keepdim=True))
    if form.z_loss:
        losses += form.z_loss * lse.square()
    if grad is not None:
        _gradient(z, target, form, p, lse)
        if ignored.any():
            p.masked_fill_(ignored, 0)
        grad.copy_(p)
    return losses.masked_fill_(ignored, 0).sum()


def _gradient(z: Tensor, target: Tensor, form: TokenForm, p: Tensor, lse: Tensor) -> None:
    """Turn probabilities into the gradient of the head's output."""
    if form.z_loss:
        p.mul_(1 + 2 * form.z_loss * lse)
    if form.smoothing:
        p.sub_(form.smoothing / z.shape[1])
    p.scatter_add_(1, target, p.new_full(target.shape, form.smoothing - 1))
    if form.cap is not None:
        p.addcmul_(p, z.div_(form.cap).square_(), value=-1)
    if form.scale != 1:
        p.mul_(form.scale)


# ---------------------------------------------------------------------- operators

_FORM = "float scale, float? cap, float smoothing, float z_loss"


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty results of the operator; a gradient that is not needed has no elements."""
    needs, dtype = rest[-1], _exact(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape if needs[1] else (0,), dtype=dtype),
        hidden.new_empty(bias.shape if bias is not None and needs[2] else (0,), dtype=dtype),
    )


@operator(
    f"linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, {_FORM}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_empty_gradients,
)
def _linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *form, needs = rest
    total, of_hidden, of_weight, of_bias = results = _empty_gradients(hidden, weight, bias, labels, needs)
    for sums in (total, of_weight, of_bias):
        sums.zero_()
    buffer = None  # the first chunk is the largest
    for rows in _chunks(len(hidden), len(weight)):
        h = hidden[rows]
        buffer = hidden.new_empty(len(h), len(weight)) if buffer is None else buffer
        logits = buffer[: len(h)]
        _head(h, weight, bias, logits)
        total += _token_losses(logits, labels[rows], TokenForm(*form), logits if any(needs) else None)
        if needs[0]:
            torch.mm(logits, weight, out=of_hidden[rows])
        if needs[1]:
            _add_product(of_weight, logits.t(), h)
        if needs[2]:
            of_bias += logits.sum(0, dtype=of_bias.dtype)
    return results


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


@operator(
    f"logits_cross_entropy(Tensor logits, Tensor labels, {_FORM}, bool need) -> (Tensor, Tensor)",
    fake=lambda logits, labels, *rest: _empty_for_logits(logits, rest[-1]),
)
def _logits(logits: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *form, need = rest
    total, grad = _empty_for_logits(logits, need)
    total.copy_(_token_losses(logits, labels, TokenForm(*form), grad if need else None))
    return total, grad


def _empty_for_logits(logits: Tensor, need: bool) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=_exact(logits.dtype)), logits.new_empty(logits.shape if need else (0,))


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A half-precision factor would shift all gradients alike, so the product is formed in the factor's dtype."""
    return (grad.to(factor.dtype) * factor).to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        form: TokenForm,
        needs: list[bool],
    ) -> Tensor:
        total, *grads = _linear(hidden, weight, bias, labels, *form, needs)
        ctx.save_for_backward(*grads)
        ctx.needs, ctx.dtype = needs, hidden.dtype
        return total  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.needs, strict=True)
        return *(_scaled(grad, factor, ctx.dtype) if need else None for grad, need in grads), None, None, None


class _LogitsCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, form: TokenForm, need: bool) -> Tensor:
        total, grad = _logits(logits, labels, *form, need)
        ctx.save_for_backward(grad)
        return total  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return _scaled(grad, factor, grad.dtype), None, None, None
