"""The optimizer chain against torch, against formulas, and to the bit through saving."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapterlab.errors import ConfigError
from adapterlab.optim import adamw, factor, master, moments, reorder, schedule
from adapterlab.optim.chain import Chain
from adapterlab.optim.transforms import Adam, Mask, Project, Transform, WeightDecay


def _steps(optimizer: torch.optim.Optimizer, p: nn.Parameter, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        p.grad = gradient.to(p.dtype)
        optimizer.step()


def _gradients(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for _ in range(count)]


def _everything(index: Tensor) -> list[Transform]:
    return [Mask(index), WeightDecay(0.1), Project(2, every=3, scale=0.5), Adam((0.8, 0.95))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decay_and_adam_equal_adamw(dtype: torch.dtype) -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6).to(dtype)) for _ in range(2))
    chain = Chain([ours], 0.05, [WeightDecay(0.3), Adam((0.8, 0.9), 1e-6)])
    reference = adamw([theirs], lr=0.05, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6)
    for optimizer, p in ((chain, ours), (reference, theirs)):
        _steps(optimizer, p, _gradients(30, 4, 6))
    torch.testing.assert_close(master(chain, ours), master(reference, theirs), rtol=1e-5, atol=1e-6)
    assert (ours.dtype, chain.state[ours]["1"]["mean"].dtype) == (dtype, master(chain, ours).dtype)


def test_without_masters_small_steps_on_bf16_are_lost_and_with_them_they_are_not() -> None:
    moved = {}
    for masters in (True, False):
        p = nn.Parameter(torch.full((8,), 1.0).bfloat16())
        optimizer = Chain([p], 1e-4, [Adam()], masters=masters)
        _steps(optimizer, p, [torch.ones(8)] * 100)
        moved[masters] = float((1 - p.data.float()).mean())
        assert ("master" in optimizer.state[p]) == masters
    assert moved[True] == pytest.approx(0.01, rel=0.2)
    assert moved[False] == 0


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
def test_projection_without_adam_is_the_orthogonal_projection_of_the_gradient(shape: Any, side: Any) -> None:
    """Computed here from the singular vectors of the gradient at the last choice, in float64."""
    gradients = [g.double() for g in _gradients(5, *shape)]
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    _steps(Chain([p], 1.0, [Project(2, every=3, scale=0.7, side=side)]), p, gradients)
    expected = torch.zeros(shape, dtype=torch.float64)
    tall = shape[0] >= shape[1]
    use_right = side in ("right", "full") or (side == "std" and tall) or (side == "reverse_std" and not tall)
    use_left = side in ("left", "full") or (side == "std" and not tall) or (side == "reverse_std" and tall)
    for step, g in enumerate(gradients):
        u, _, v = torch.linalg.svd(gradients[step // 3 * 3])
        kept = u[:, :2] @ u[:, :2].T @ g if use_left else g
        expected -= 0.7 * (kept @ v[:2].T @ v[:2] if use_right else kept)
    torch.testing.assert_close(p.data, expected)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_full_rank_projection_is_plain_sgd(shape: Any) -> None:
    p, plain = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    _steps(Chain([p], 0.1, [Project(99, every=2)]), p, _gradients(7, *shape))
    _steps(torch.optim.SGD([plain], lr=0.1), plain, _gradients(7, *shape))
    torch.testing.assert_close(p.data, plain.data, rtol=0, atol=1e-5)


def test_adam_in_a_subspace_equals_adam_on_the_projected_gradient() -> None:
    shape, r = (5, 8), 3
    gradients = _gradients(6, *shape)
    p = nn.Parameter(torch.zeros(shape))
    _steps(Chain([p], 0.1, [WeightDecay(0.2), Project(r, every=100, scale=0.25), Adam()]), p, gradients)
    basis = torch.linalg.svd(gradients[0])[0][:, :r]
    low = nn.Parameter(torch.zeros(r, shape[1]))
    adam, expected = torch.optim.Adam([low], lr=1.0), torch.zeros(shape)
    for g in gradients:
        before = low.detach().clone()
        _steps(adam, low, [basis.T @ g])
        expected = expected - 0.1 * (0.25 * basis @ (before - low.detach()) + 0.2 * expected)
    torch.testing.assert_close(p.data, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "floats"), [((8, 40), 2 * 40 * 3 + 8 * 3), ((40, 8), 2 * 40 * 3 + 8 * 3)])
def test_the_state_of_a_projected_matrix_is_of_size_r(shape: Any, floats: int) -> None:
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Chain([p], 0.1, [Project(3, every=2), Adam()])
    _steps(optimizer, p, _gradients(3, *shape))
    tensors = [v for state in optimizer.state[p].values() for v in state.values() if isinstance(v, Tensor)]
    assert sum(t.numel() for t in tensors) == floats
    # storage too: a view would keep the whole decomposition alive
    assert sum(t.untyped_storage().nbytes() for t in tensors) == 4 * floats


def test_masked_entries_stay_whatever_decay_and_momentum_do() -> None:
    index = torch.tensor([1, 7, 20])
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    p = nn.Parameter(start.clone())
    _steps(Chain([p], 0.1, [Mask(index), WeightDecay(0.1), Adam()]), p, _gradients(20, 4, 6))
    changed = (p.data != start).flatten().nonzero().flatten()
    assert changed.tolist() == index.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy"])
def test_a_resumed_run_is_equal_to_the_bit(dtype: torch.dtype, way: str) -> None:
    index, gradients = torch.arange(0, 24, 2), _gradients(11, 4, 6)
    p = nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6).to(dtype))
    optimizer = Chain([p], 1e-2, _everything(index))
    _steps(optimizer, p, gradients[:4])  # a subspace that was not chosen at step 0 and is in use
    if way == "deepcopy":
        twin, resumed = copy.deepcopy((p, optimizer))
    else:
        twin = nn.Parameter(p.data.clone())
        resumed = Chain([twin], 1e-2, _everything(index))
        state = optimizer.state_dict()
        if way == "file":
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            state = torch.load(buffer, weights_only=True)
        resumed.load_state_dict(state)
        held = resumed.state[twin]["3"]["mean"]
        assert held.data_ptr() != optimizer.state[p]["3"]["mean"].data_ptr(), "the two must not share state"
    _steps(optimizer, p, gradients[4:])
    _steps(resumed, twin, gradients[4:])
    assert torch.equal(twin.data, p.data)
    assert torch.equal(master(resumed, twin), master(optimizer, p))
    assert resumed.state[twin]["3"]["step"] == 11


def test_groups_have_their_own_transforms_and_follow_schedules() -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Chain([{"params": [a]}, {"params": [b], "lr": 1.0, "transforms": [WeightDecay(1.0)]}], lr=0.5)
    plan = schedule(optimizer, partial(factor, total=4, kind="linear"))
    for _ in range(2):
        a.grad, b.grad = torch.ones(2), torch.zeros(2)
        optimizer.step()
        plan.step()
    assert a.data.tolist() == pytest.approx([1 - 0.5 - 0.375] * 2)
    assert b.data.tolist() == pytest.approx([(1 - 1.0) * (1 - 0.75)] * 2)
    assert all(set(group) == {"params", "lr", "initial_lr"} for group in optimizer.param_groups)


def test_parameters_without_gradient_stay_and_get_no_state() -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Chain([a, b], 0.1, [WeightDecay(0.5), Adam()])
    _steps(optimizer, a, [torch.ones(2)])
    assert torch.equal(b.data, torch.ones(2))
    assert b not in optimizer.state


def test_like_takes_over_the_settings_and_refuses_other_optimizers() -> None:
    a, b = (nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(2))) for _ in range(2))
    settings: Any = {"weight_decay": 0.1, "betas": (0.7, 0.8), "eps": 1e-5}
    chain = Chain.like(adamw([{"params": [a], "lr_factor": 0.5}], lr=0.2, **settings), [()])
    _steps(chain, a, _gradients(5, 4, 3))
    _steps(adamw([b], lr=0.1, **settings), b, _gradients(5, 4, 3))
    torch.testing.assert_close(a.data, b.data, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"received SGD.*adamw"):
        Chain.like(torch.optim.SGD([a], lr=0.1), [()])


def test_entries_that_count_their_own_steps_begin_as_if_the_run_did() -> None:
    """After 1,000 steps one entry of two is put in another's place: it makes the steps of a new parameter."""
    gradients = _gradients(1003, 2)
    p, new = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    chain = Chain([p], 0.1, [Adam(each=True)])
    whole = nn.Parameter(torch.zeros(2))
    plain = Chain([whole], 0.1, [Adam()])
    for optimizer, q in ((chain, p), (plain, whole)):
        _steps(optimizer, q, gradients[:1000])
    torch.testing.assert_close(p.data, whole.data, rtol=1e-4, atol=1e-4)
    assert len(moments(chain, p)) == 3
    reorder(
        moments(chain, p), torch.tensor([1, 0]), torch.tensor([True, False])
    )  # the second stays, at the first place
    with torch.no_grad():
        p.copy_(torch.tensor([float(whole[1]), 0.0]))
    swapped = [g.flip(0) for g in gradients[1000:]]
    fresh = Chain([new], 0.1, [Adam()])
    _steps(chain, p, swapped)
    _steps(plain, whole, gradients[1000:])
    _steps(fresh, new, [g[1:] for g in swapped])
    torch.testing.assert_close(p.data, torch.stack([whole.data[1], new.data[0]]), rtol=1e-4, atol=1e-4)
