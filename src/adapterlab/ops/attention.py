"""Exact softmax attention for training on a CPU, of whole batches and of samples packed behind each other.

torch's own kernel for CPUs keeps nothing but its output and a sum for each row, as this one does, but its backward pass
(and where the processor has no tile instructions for bfloat16, its forward pass) spends most of its time outside the
matrix products. Here a tile of scores goes through three fused steps of torch: one batched product
for all heads and samples, one softmax (which accumulates in float32), one product with the values. The queries of all
heads that share a key-value head are rows of one product. The backward pass computes the probabilities anew, tile by
tile. With causality, keys behind the last query of a tile are never touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterlab.foreign.private_torch import has_tile_products, softmax_backward
from adapterlab.ops.operator import operator

SCORES = 2**21  # of a tile at most, where it holds several samples: its buffers stay in the last cache
SHORT = 256
_GROUPED = (torch.bfloat16,)  # where a product's overhead outweighs padding; in float32 its operations do
_LIKE = 0.65  # of the longest sample's length at least, to be padded with it
_STEP = 32  # padded lengths are multiples of it, so that few shapes of products occur
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    causal: bool = True,
    bounds: Tensor | None = None,
    key_bounds: Tensor | None = None,
) -> Tensor:
    """Compute softmax(scale · q kᵀ) v with as many keys as queries, or in packed samples with more.

    Products run in the dtype of q, and scores are rounded to it; the softmax accumulates in float32. Kept for the
    backward pass: q, k and v.

    Args:
        q: `[batch, heads, tokens, head_dim]` on the CPU, bfloat16, float32 or float64.
        k: `[batch, kv_heads, tokens, head_dim]`; heads are a multiple of kv_heads.
        v: `[batch, kv_heads, tokens, value_dim]`.
        scale: of the scores; default: 1 / √head_dim.
        causal: whether no query sees a later key.
        bounds: of a batch of one, the borders of samples that do not see each other: int32 `[samples + 1]`, from 0 to
            the number of tokens. Each sample is computed at its own length.
        key_bounds: the borders of the same samples among keys and values, where those have more: a sample's queries
            are the last of its tokens, and what stands before them is seen by all. Default: `bounds`.

    Returns:
        `[batch, tokens, heads, value_dim]`, contiguous.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out: Tensor = _Attention.apply(q, k, v, scale, causal, bounds, key_bounds)
        return out
    computed: Tensor = softmax_attention(q, k, v, scale, causal, bounds, key_bounds)
    return computed


def each_segment(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, key_bounds: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Cut packed queries, keys and values `[1, heads, tokens, head_dim]` at the borders of the samples."""
    lengths = bounds.diff().tolist()
    keys = lengths if key_bounds is None else key_bounds.diff().tolist()
    return zip(q.split(lengths, 2), k.split(keys, 2), v.split(keys, 2), strict=True)


def pays(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None = None) -> bool:
    """Say whether `attention` can stand for torch's own, and is faster.

    Measured on two cores with 9 heads on 3 key-value heads of width 64, forward and backward together, against torch's
    kernel: in bfloat16 0.15 to 0.4 of its time at every length from 16 to 2048 tokens; in float32 0.65 to 0.9 from 256
    tokens on and 1 to 1.3 below, where attention matters little. Packed samples are one call here and one each there.
    """
    if q.device.type != "cpu" or q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return False
    if torch.is_autocast_enabled("cpu") or len(q) != len(k) or q.shape[1] % k.shape[1]:
        return False
    if bounds is None and q.shape[2] != k.shape[2]:
        return False
    return bounds is not None or (q.shape[2] > 1 if q.dtype is torch.bfloat16 else q.shape[2] >= SHORT)


def varlen_works(q: Tensor, v: Tensor) -> bool:
    """Say whether torch has a kernel for packed samples on this device."""
    return (
        q.device.type == "cuda"
        and torch.version.hip is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[3] == v.shape[3] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float | None = None,
    *,
    causal: bool = True,
) -> Tensor:
    """Compute what `attention` does with `bounds` by torch's kernel on a GPU.

    Args:
        q: as for `attention`.
        k: likewise.
        v: likewise.
        bounds: `bounds` and `key_bounds` there, int32.
        longest: most queries, and most keys, of a sample.
        scale: likewise.
        causal: likewise.

    Returns:
        `[1, tokens, heads, value_dim]`.
    """
    from torch.nn.attention import varlen  # brings torch's compiler: a second and a half

    kernel: Any = varlen.varlen_attn
    window = (-1, 0) if causal else (-1, -1)
    grouped = q.shape[1] != k.shape[1]
    flat = (t[0].transpose(0, 1) for t in (q, k, v))
    out: Tensor = kernel(*flat, *bounds, *longest, scale=scale, window_size=window, enable_gqa=grouped)
    return out[None]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        causal: bool,
        bounds: Tensor | None,
        key_bounds: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, bounds, key_bounds)
        ctx.scale, ctx.causal = scale, causal
        out: Tensor = softmax_attention(q, k, v, scale, causal, bounds, key_bounds)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *bounds = ctx.saved_tensors
        return *softmax_attention_backward(grad, q, k, v, ctx.scale, ctx.causal, *bounds), None, None, None, None


def _like_output(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _like_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@operator(
    "softmax_attention(Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? bounds, Tensor? key_bounds)"
    " -> Tensor",
    _like_output,
)
def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bounds: Tensor | None, key_bounds: Tensor | None
) -> Tensor:
    """The forward pass; see `attention`."""
    out = _like_output(q, k, v)
    if _torch_is_faster(q, v):
        _by_torch(out.transpose(1, 2), q, k, v, scale, causal, bounds, key_bounds)
        return out
    later = _later(q, causal)
    for queries, keys in _groups(q, causal, bounds, key_bounds):
        tiles = _Tiles(queries.take(q), keys.take(k), scale, later)
        values, part = _rows(keys.take(v)), queries.room(out.transpose(1, 2))
        for start, end, seen in tiles:
            mixed = torch.bmm(tiles.probabilities(start, end, seen)[1], values[:, :seen])
            part[:, :, start:end] = mixed.view(*tiles.shape[:2], end - start, -1)
        queries.put(out.transpose(1, 2), part)
    return out


def _torch_is_faster(q: Tensor, v: Tensor) -> bool:
    """Say whether torch's kernel has the faster forward pass: where its products run on tiles, by 0.3 to 0.6."""
    return q.dtype is torch.bfloat16 and q.shape[3] == v.shape[3] and has_tile_products()


def _by_torch(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    bounds: Tensor | None,
    key_bounds: Tensor | None,
) -> None:
    grouped = q.shape[1] != k.shape[1]
    samples = [(q, k, v)] if bounds is None else each_segment(q, k, v, bounds, key_bounds)
    rooms = [out] if bounds is None else out.split(bounds.diff().tolist(), 2)
    for room, (query, key, value) in zip(rooms, samples, strict=True):
        if room.shape[2]:
            mask = visible(query, key) if causal and query.shape[2] != key.shape[2] else None
            room.copy_(
                F.scaled_dot_product_attention(
                    query, key, value, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
                )
            )


def visible(q: Tensor, k: Tensor) -> Tensor:
    """Which keys causal queries see, where the queries are the last of the tokens: bool `[queries, keys]`."""
    queries, keys = q.shape[2], k.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)


@operator(
    "softmax_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? bounds,"
    " Tensor? key_bounds) -> (Tensor, Tensor, Tensor)",
    _like_gradients,
)
def softmax_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    bounds: Tensor | None,
    key_bounds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass: with probabilities P, dV = Pᵀ dO, dS = P ∘ (dP − Σ P dP), dQ = dS K and dK = dSᵀ Q."""
    dq, dk, dv = _like_gradients(grad, q, k, v)
    later = _later(q, causal)
    for queries, keys in _groups(q, causal, bounds, key_bounds):
        tiles = _Tiles(queries.take(q), keys.take(k), scale, later)
        values, sums = _rows(keys.take(v)), _Sums()
        upper, part = queries.take(grad.transpose(1, 2), padding=0.0), queries.room(dq)
        for start, end, seen in tiles:
            scaled, p = tiles.probabilities(start, end, seen)
            g = upper[:, :, start:end].contiguous().view(*scaled.shape[:2], -1)
            dp = torch.bmm(g, values[:, :seen].mT, out=tiles.view(0, p.shape))
            ds = softmax_backward(dp, p, dp)
            part[:, :, start:end] = torch.bmm(ds, tiles.keys[:, :seen]).view(*tiles.shape[:2], end - start, -1)
            sums.add(torch.bmm(ds.mT, scaled), torch.bmm(p.mT, g))
        queries.put(dq, part)
        for whole, total in zip((dk, dv), sums.totals, strict=True):
            part = keys.room(whole)
            keys.put(whole, part.copy_(total.view(part.shape)))
    return dq.mul_(scale), dk, dv


class _Sums:
    """Gradients of keys and values, summed over tiles; the first tile sees all keys, later ones fewer."""

    def __init__(self) -> None:
        self.totals: list[Tensor] = []

    def add(self, *shares: Tensor) -> None:
        if not self.totals:
            self.totals = [*shares]
            return
        for i, share in enumerate(shares):
            wide = self.totals[i].to(torch.promote_types(share.dtype, torch.float32))  # a copy at most once
            wide[:, : share.shape[1]] += share
            self.totals[i] = wide


class _Tiles:
    """Blocks of queries of samples of one length, last block first, with buffers for their scores.

    Where there are more keys than queries, the first ones are seen by every query.
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float, later: Tensor | None):
        self.q, self.keys, self.shape = q, _rows(k), q.shape
        self.scale, self.later = scale, later
        self.before = k.shape[2] - q.shape[2]
        self.block = _block(q.shape[2])
        self.buffers = q.new_empty(2, q.shape[0] * q.shape[1] * self.block * k.shape[2])

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        length = self.shape[2]
        for start in reversed(range(0, length, self.block)):
            end = min(start + self.block, length)
            yield start, end, self.before + (length if self.later is None else end)

    def view(self, buffer: int, shape: torch.Size) -> Tensor:
        """The beginning of a buffer, so that tiles of every size are contiguous."""
        return self.buffers[buffer, : shape.numel()].view(shape)

    def probabilities(self, start: int, end: int, seen: int) -> tuple[Tensor, Tensor]:
        """Scaled queries `[batch · kv_heads, group · queries, head_dim]` and the probabilities of the keys they see."""
        batch, heads, _, width = self.shape
        count = end - start
        queries = self.q.new_empty(batch, heads, count, width)
        torch.mul(self.q[:, :, start:end], self.scale, out=queries)
        queries = queries.view(len(self.keys), -1, width)
        shape = torch.Size((*queries.shape[:2], seen))
        scores = torch.bmm(queries, self.keys[:, :seen].mT, out=self.view(0, shape))
        if self.later is not None:
            scores.view(-1, count, seen)[:, :, self.before + start :] += self.later[:count, :count]
        return queries, torch.softmax(scores, -1, out=self.view(1, shape))


_LONGEST = 128  # queries of a tile


def _block(length: int) -> int:
    """Queries of a tile: few waste little above the diagonal, many make large products; measured."""
    return min(length, _LONGEST, max(64, length // 8))


def _later(q: Tensor, causal: bool) -> Tensor | None:
    """What is added to the scores of a square tile: -inf where the key is later than the query."""
    return q.new_full((_LONGEST, _LONGEST), -torch.inf).triu_(1) if causal else None


def _rows(t: Tensor) -> Tensor:
    """`[batch, kv_heads, tokens, width]` as `[batch · kv_heads, tokens, width]`."""
    return t.reshape(-1, *t.shape[2:])


class _Samples:
    """Samples that lie behind each other, or a batch of them: they are computed where they are.

    All tensors are `[batch, heads, tokens, width]`.
    """

    def __init__(self, *here: slice):
        self.here = here

    def take(self, t: Tensor, padding: float | None = None) -> Tensor:
        """The samples' part of a tensor."""
        return t[self.here]

    def room(self, t: Tensor) -> Tensor:
        """Where their part of a result is written."""
        return t[self.here]

    def put(self, t: Tensor, part: Tensor) -> None:
        """Bring the part that was written in `room` to its place."""


class _Padded(_Samples):
    """Packed samples of like length as one padded batch; with causality no query sees the padding behind it.

    At padding stands the sample's last token once more.
    """

    def __init__(self, spans: Sequence[_Span], width: int, device: torch.device):
        at, length = torch.arange(width), torch.tensor([span.length for span in spans])[:, None]
        index = torch.tensor([span.start for span in spans])[:, None] + torch.minimum(at, length - 1)
        self.shape = index.shape
        self.real = (at < length).flatten().to(device)
        self.index = index.flatten().to(device)
        self.places = self.index[self.real]

    def take(self, t: Tensor, padding: float | None = None) -> Tensor:
        part = t[0].transpose(0, 1).index_select(0, self.index)
        if padding is not None:
            part[~self.real] = padding
        return part.view(*self.shape, *part.shape[1:]).transpose(1, 2)

    def room(self, t: Tensor) -> Tensor:
        return t.new_empty(*self.shape, t.shape[1], t.shape[3]).transpose(1, 2)

    def put(self, t: Tensor, part: Tensor) -> None:
        tokens = part.transpose(1, 2).flatten(0, 1)
        t[0].transpose(0, 1).index_copy_(0, self.places, tokens[self.real])


class _Span(NamedTuple):
    """Where tokens of a sample lie."""

    length: int
    start: int


def _spans(bounds: Tensor) -> list[_Span]:
    return [_Span(b - a, a) for a, b in itertools.pairwise(bounds.tolist())]


def _groups(
    q: Tensor, causal: bool, bounds: Tensor | None, key_bounds: Tensor | None
) -> list[tuple[_Samples, _Samples]]:
    """The queries and the keys of what is computed together: samples of one length, or packed samples of like length.

    Samples in a padded batch have the same number of keys before their queries.
    """
    if bounds is None:
        size = max(1, SCORES // (q.shape[1] * _block(q.shape[2]) * q.shape[2]))
        return [(part, part) for part in (_Samples(slice(i, i + size)) for i in range(0, len(q), size))]
    queries = _spans(bounds)
    keys = queries if key_bounds is None else _spans(key_bounds)
    pairs = [(k.length - q.length, q, k) for q, k in zip(queries, keys, strict=True) if q.length]
    groups: list[list[tuple[int, _Span, _Span]]] = []
    for pair in sorted(pairs, reverse=True):
        if groups and _is_like(pair, groups[-1][0], causal and q.dtype in _GROUPED):
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return [_group(group, q.device) for group in groups]


def _is_like(pair: tuple[int, _Span, _Span], longest: tuple[int, _Span, _Span], padded: bool) -> bool:
    """Say whether a sample joins a batch of which another is the longest."""
    (before, one, _), (beside, other, _) = pair, longest
    alike = one.length >= _LIKE * other.length if padded else one.length == other.length <= SHORT
    return before == beside and alike


def _group(group: Sequence[tuple[int, _Span, _Span]], device: torch.device) -> tuple[_Samples, _Samples]:
    before, queries, keys = zip(*group, strict=True)
    if len(group) == 1:
        here = [_Samples(slice(None), slice(None), slice(s.start, s.start + s.length)) for s in (queries[0], keys[0])]
        return here[0], here[1]
    lengths = {span.length for span in queries}
    width = max(lengths) if len(lengths) == 1 else -(-max(lengths) // _STEP) * _STEP
    rows = _Padded(queries, width, device)
    return rows, rows if queries == keys else _Padded(keys, before[0] + width, device)
