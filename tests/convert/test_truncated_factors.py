"""Truncated decompositions against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapterlab.convert.low_rank import Factors, fit, svd
from adapterlab.errors import ConfigError


def matrix(out: int, in_: int, values: list[float], seed: int = 0) -> torch.Tensor:
    """A matrix with given singular values."""
    draw = np.random.default_rng(seed)
    u, _ = np.linalg.qr(draw.normal(size=(out, len(values))))
    v, _ = np.linalg.qr(draw.normal(size=(in_, len(values))))
    return torch.from_numpy(u * np.array(values) @ v.T)


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("factored", [False, True])
def test_the_best_approximation_of_a_rank_and_its_error(rank, factored) -> None:
    change = torch.randn(20, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    source = Factors(change, torch.eye(12, dtype=torch.float64)) if factored else change
    found = fit(source, rank=rank)
    u, s, vh = np.linalg.svd(change.numpy(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    np.testing.assert_allclose(found.factors.dense().numpy(), best, atol=1e-10)
    assert found.factors.rank == rank
    assert found.error == pytest.approx(
        np.linalg.norm(change.numpy() - best) / np.linalg.norm(change.numpy()), rel=1e-9
    )


def test_factors_are_balanced() -> None:
    found = fit(matrix(9, 14, [4.0, 1.0])).factors
    torch.testing.assert_close(found.B.norm(dim=0), found.A.norm(dim=1))


# squared: 16, 4, 1, 1; sum 22
@pytest.mark.parametrize(
    ("energy", "rank"), [(0.5, 1), (16 / 22, 1), (0.73, 2), (20 / 22, 2), (0.92, 3), (0.96, 4), (1.0, 4)]
)
def test_energy_takes_the_smallest_rank_that_suffices(energy, rank) -> None:
    found = fit(matrix(10, 8, [4.0, 2.0, 1.0, 1.0]), energy=energy)
    assert found.factors.rank == rank
    assert 1 - found.error**2 >= energy - 1e-9


def test_rounding_is_not_rank() -> None:
    change = matrix(30, 20, [3.0, 2.0, 1.0]) + 1e-6 * torch.randn(30, 20, dtype=torch.float64)
    assert fit(change, floor=1e-4).factors.rank == 3
    assert fit(change, energy=1.0, floor=1e-4).factors.rank == 3
    assert fit(change, floor=0.0).factors.rank == 20
    assert fit(change, rank=5, floor=1e-4).factors.rank == 5  # a rank that was asked for is obeyed


def test_the_randomised_decomposition_is_right_or_gives_way(monkeypatch) -> None:
    steep = matrix(520, 540, [2.0**-i for i in range(30)])
    flat = torch.randn(520, 540, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact = {}
    for name, change in {"steep": steep, "flat": flat}.items():
        exact[name] = np.linalg.svd(change.numpy(), compute_uv=False)
    called = []
    full = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **k: called.append(m.shape) or full(m, **k))
    before = torch.random.get_rng_state()
    _, s, _ = svd(steep, rank=6)
    assert (520, 540) not in called
    np.testing.assert_allclose(s.numpy(), exact["steep"][:6], rtol=1e-8)
    assert fit(steep, energy=0.99).factors.rank == int((np.cumsum(4.0 ** -np.arange(30)) < 0.99 * 4 / 3).sum()) + 1
    assert (520, 540) not in called
    _, s, _ = svd(flat, rank=6)
    assert (520, 540) in called
    np.testing.assert_allclose(s.numpy()[:6], exact["flat"][:6], rtol=1e-10)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("options", "part"),
    [({"rank": 0}, "rank=0"), ({"energy": 1.2}, "energy=1.2"), ({"rank": 2, "energy": 0.5}, "both")],
)
def test_bad_sizes(options, part) -> None:
    with pytest.raises(ConfigError, match=part):
        fit(torch.eye(3), **options)
