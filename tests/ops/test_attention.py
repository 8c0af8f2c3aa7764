"""Attention for the CPU against torch's own, and what the compiler and checkpoint policies see of it."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adapterlab.ops import attention as module
from adapterlab.ops.attention import attention, each_segment, pays

BOUNDS = torch.tensor([0, 5, 6, 13], dtype=torch.int32)


def tensors(
    batch: int, length: int, heads: int, groups: int, dtype: torch.dtype = torch.float64, width: int = 4, value: int = 4
) -> list[Tensor]:
    """Queries, keys and values as models make them: heads next to each other in memory."""
    draw = torch.Generator().manual_seed(length)
    sizes = ((heads, width), (groups, width), (groups, value))
    made = [torch.randn(batch, length, *size, generator=draw, dtype=torch.float64) for size in sizes]
    return [t.to(dtype).transpose(1, 2).requires_grad_() for t in made]


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bounds: Tensor | None) -> Tensor:
    """Softmax over what is visible, with the heads repeated and every border in a mask."""
    length = q.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool)
    if causal:
        visible = visible.tril()
    if bounds is not None:
        owner = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(pairwise(bounds.tolist()))])
        visible = visible & (owner[:, None] == owner)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = (scale * q @ k.mT).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize(("heads", "groups", "value"), [(4, 2, 4), (3, 3, 4), (2, 1, 6)])
def test_it_is_the_textbook_formula(causal: bool, bounds: Tensor | None, heads: int, groups: int, value: int) -> None:
    parts = tensors(1 if bounds is not None else 3, 13, heads, groups, value=value)
    found = attention(*parts, 0.3, causal=causal, bounds=bounds)
    expected = reference(*parts, 0.3, causal, bounds)
    torch.testing.assert_close(found, expected)
    grad = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(found, parts, grad)
    for found_grad, expected_grad in zip(gradients, torch.autograd.grad(expected, parts, grad), strict=True):
        torch.testing.assert_close(found_grad, expected_grad)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_gradients_by_differences(causal: bool, bounds: Tensor | None) -> None:
    parts = tensors(1 if bounds is not None else 2, 13, 2, 1)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, causal=causal, bounds=bounds), parts)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("shape", [(3, 150), (1, 1), (2, 64), (2, 65)])
def test_several_tiles_and_dtypes_against_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(module, "SCORES", 40_000)  # the samples do not share a tile
    batch, length = shape
    parts = tensors(batch, length, 6, 2, dtype, width=16, value=16)
    exact = [p.detach().double().requires_grad_() for p in parts]
    found = attention(*parts)
    expected = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True).transpose(1, 2)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, parts, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    )
    for value, right in pairs:
        assert value.dtype == dtype
        assert float((value.double() - right).detach().norm()) <= tolerance * float(right.detach().norm()) + 1e-12


@pytest.mark.parametrize("tiles", [True, False], ids=["torch's forward pass", "tiles"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [None, BOUNDS, torch.tensor([0, 4, 4, 13], dtype=torch.int32)])
def test_both_forward_passes_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, tiles: bool, causal: bool, bounds: Tensor | None
) -> None:
    """Which is taken depends on the processor; both have heads of queries that share keys, and empty samples."""
    monkeypatch.setattr(module, "has_tile_products", lambda: tiles)
    taken = []
    torchs = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: taken.append(1) or torchs(*a, **k))
    parts = tensors(1 if bounds is not None else 3, 13, 6, 2, torch.bfloat16, width=16, value=16)
    found = attention(*parts, 0.3, causal=causal, bounds=bounds).detach().double()
    expected = reference(*(p.detach().double() for p in parts), 0.3, causal, bounds)
    assert float((found - expected).norm()) < 1e-2 * float(expected.norm())
    assert len(taken) == (tiles and (1 if bounds is None else int(bounds.diff().count_nonzero())))


def test_samples_do_not_see_each_other() -> None:
    q, k, v = tensors(1, 13, 2, 2)
    before = attention(q, k, v, bounds=BOUNDS)
    with torch.no_grad():
        for t in (q, k, v):
            t[:, :, 5] += 1
    after = attention(q, k, v, bounds=BOUNDS)
    changed = (before != after).flatten(2).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [5]
    assert [part[0].shape[2] for part in each_segment(q, k, v, BOUNDS)] == [5, 1, 7]


@pytest.mark.parametrize("lengths", [[9, 300, 1, 210, 33, 290, 20], [5], [40, 40, 40], [130, 0, 131, 64]])
def test_samples_padded_to_like_lengths_are_the_same(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    parts = tensors(1, sum(lengths), 6, 2, value=5)
    grad = torch.randn(1, sum(lengths), 6, 5, dtype=torch.float64)
    found = []
    for grouped in ((), (torch.float64,)):
        monkeypatch.setattr(module, "_GROUPED", grouped)
        sizes = [len(getattr(group, "shape", ())) for group, _ in module._groups(parts[0], True, bounds, None)]
        out = attention(*parts, bounds=bounds)
        found.append((sizes, out, *torch.autograd.grad(out, parts, grad)))
    (alone, *expected), (together, *padded) = found
    assert len(together) <= len(alone) <= sum(length > 0 for length in lengths)
    assert any(together) == (len(lengths) > 1)
    for one, other in zip(padded, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tiles", [True, False], ids=["torch's forward pass", "tiles"])
@pytest.mark.parametrize("causal", [True, False])
def test_samples_may_see_more_keys_than_they_have_queries(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tiles: bool, causal: bool
) -> None:
    """Each sample against itself alone; lengths are such that some share a batch, padded or not, and some do not."""
    monkeypatch.setattr(module, "has_tile_products", lambda: tiles)
    lengths, before = [5, 7, 7, 6, 0, 90, 7, 7], [0, 5, 5, 5, 0, 70, 0, 0]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    key_bounds = torch.tensor([0, *accumulate(map(sum, zip(lengths, before, strict=True)))], dtype=torch.int32)
    q = tensors(1, int(bounds[-1]), 6, 2, dtype, width=16, value=16)[0]
    k, v = tensors(1, int(key_bounds[-1]), 6, 2, dtype, width=16, value=16)[1:]
    found = attention(q, k, v, 0.3, causal=causal, bounds=bounds, key_bounds=key_bounds)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    outputs = []
    for one, keys, values in each_segment(*exact, bounds, key_bounds):
        scores = 0.3 * one @ keys.repeat_interleave(3, 1).mT
        if causal:
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(1 + keys.shape[2] - one.shape[2])
            scores = scores.masked_fill(hidden, -torch.inf)
        outputs.append((scores.softmax(-1) @ values.repeat_interleave(3, 1)).transpose(1, 2))
    expected = torch.cat(outputs, 1)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, (q, k, v), grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    )
    for value, right in pairs:
        difference = float((value.double() - right).detach().norm()) / float(right.detach().norm())
        assert difference < (1e-12 if dtype is torch.float64 else 2e-2)


def test_only_the_inputs_are_kept() -> None:
    parts = tensors(2, 70, 4, 2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention(*parts)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in parts}


@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_operators_are_sound(bounds: Tensor | None) -> None:
    q, k, v = (t.detach() for t in tensors(1, 13, 4, 2))
    checks = ("test_schema", "test_faketensor")
    rest = (0.5, True, bounds, None)
    torch.library.opcheck(module.softmax_attention, (q, k, v, *rest), test_utils=checks)
    grad = torch.randn(1, 13, 4, 4, dtype=q.dtype)
    torch.library.opcheck(module.softmax_attention_backward, (grad, q, k, v, *rest), test_utils=checks)


def test_it_compiles_to_one_graph() -> None:
    parts = tensors(2, 20, 4, 2)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v).sin().sum(), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*parts), parts)
    expected = torch.autograd.grad(attention(*parts).sin().sum(), parts)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_when_it_is_used() -> None:
    def used(dtype: torch.dtype, length: int, keys: int | None = None, bounds: Tensor | None = None) -> bool:
        q, k = torch.zeros(1, 2, length, 4, dtype=dtype), torch.zeros(1, 2, keys or length, 4, dtype=dtype)
        return pays(q, k, k, bounds)

    assert used(torch.bfloat16, 16)
    assert used(torch.float32, 512)
    assert used(torch.float32, 13, bounds=BOUNDS)
    assert not used(torch.float32, 32), "torch's own is faster"
    assert not used(torch.bfloat16, 1), "decoding"
    assert not used(torch.bfloat16, 4, keys=9), "a cache"
    assert not used(torch.float16, 512)
    with torch.autocast("cpu", torch.bfloat16):
        assert not used(torch.float32, 512), "autocast changes dtypes inside"
