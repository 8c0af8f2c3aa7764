"""What the tracker counts, against byte counts made by hand."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from adapterlab.errors import ConfigError
from adapterlab.ops.low_rank import low_rank_linear
from adapterlab.ops.operator import operator
from adapterlab.plan.tracker import Tracker, contentless

KIB = 1024


def _doubled_fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@operator("plan_test_inside(Tensor x) -> Tensor", _doubled_fake)
def plan_test_inside(x: torch.Tensor) -> torch.Tensor:
    wide = torch.cat([x] * 7)  # working memory that no caller sees
    return wide[: len(x)].clone()


def _program() -> torch.Tensor:
    a = torch.ones(KIB)  # 4 KiB
    b = a * 2  # 8 KiB alive
    view = b[:4]
    del a, b  # the view keeps 4 KiB
    c = torch.ones(4 * KIB)  # 20 KiB
    del c
    return view


@pytest.mark.parametrize("real", [True, False])
def test_live_bytes_follow_storages_and_views(real: bool) -> None:
    with contentless() as fake, Tracker(None if real else fake) as tracker:
        if real:
            with torch._subclasses.fake_tensor.unset_fake_temporarily():
                kept = _program()
        else:
            kept = _program()
        assert tracker.moments["setup"].total == 20 * KIB
        assert tracker.total == 4 * KIB
        del kept
        gc.collect()
        assert tracker.total == 0


def test_memory_inside_own_operators_is_seen() -> None:
    with contentless() as fake, Tracker(fake) as tracker:
        x = torch.ones(KIB)
        out = plan_test_inside(x)
    # x, the sevenfold copy, the result
    assert tracker.moments["setup"].total == 4 * KIB * (1 + 7 + 1)
    assert tracker.total == 2 * 4 * KIB
    assert out.shape == x.shape


def test_whole_numbers_are_real_and_masks_choose_real_counts() -> None:
    with contentless() as fake, Tracker(fake):
        labels = torch.tensor([[1, -100, 3], [-100, -100, 2]])
        hidden = torch.randn(2, 3, 5)
        bears = labels != -100
        assert int(bears.sum()) == 3
        assert hidden[bears].shape == (3, 5)


def test_products_are_counted() -> None:
    with contentless() as fake, Tracker(fake) as tracker:
        torch.randn(3, 5) @ torch.randn(5, 7)
    assert tracker.flops == 2 * 3 * 5 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_groups_are_counted_in_both_directions(dtype: torch.dtype) -> None:
    rows = [3, 0, 13]
    with contentless() as fake, Tracker(fake) as tracker:
        x = torch.randn(16, 8, dtype=dtype, requires_grad=True)
        w = torch.randn(3, 8, 24, dtype=dtype, requires_grad=True)
        out = torch._grouped_mm(x, w, offs=torch.tensor(rows, dtype=torch.int32).cumsum(0, dtype=torch.int32))
        assert (out.shape, out.dtype) == ((16, 24), dtype)
        assert tracker.flops == sum(2 * n * 8 * 24 for n in rows)
        out.backward(torch.ones_like(out))
        assert (x.grad.shape, w.grad.shape) == (x.shape, w.shape)
    assert tracker.flops == 3 * sum(2 * n * 8 * 24 for n in rows)


@pytest.mark.parametrize("real", [True, False])
def test_products_inside_own_operators_are_counted(real: bool) -> None:
    with contextlib.nullcontext() if real else contentless() as fake, Tracker(fake) as tracker:
        low_rank_linear(torch.randn(3, 5), torch.randn(7, 5), None, torch.randn(2, 5), torch.randn(7, 2), 1.0)
    assert tracker.flops == 2 * 3 * (5 * 7 + 5 * 2 + 2 * 7)


def test_parts_add_up_and_can_be_renamed() -> None:
    with contentless() as fake, Tracker(fake) as tracker:
        tracker.enter("a", "first")
        x = torch.ones(KIB)
        tracker.enter("b", "second")
        y = torch.ones(2 * KIB)
        tracker.assign(x, "third")
        tracker.rename("second", "fourth")
        assert tracker.snapshot() == {"third": 4 * KIB, "fourth": 8 * KIB}
        assert y.numel() == 2 * KIB
    assert tracker.moments["a"].total == 4 * KIB


def test_sizes_round_to_the_allocators_blocks() -> None:
    with contentless() as fake, Tracker(fake, granularity=512) as tracker:
        kept = torch.ones(1)
    assert tracker.total == 512
    assert kept.numel() == 1


def test_results_whose_shape_depends_on_numbers_are_refused() -> None:
    with contentless() as fake, Tracker(fake), pytest.raises(ConfigError, match=r"nonzero.*measure a short run"):
        torch.randn(4).relu().nonzero()
