"""Resampling, correction and ranks against brute force, and their error rates under known truth."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from adapterlab.compare.results import Difference
from adapterlab.compare.statistics import Sheets, differences, holm, interval, ranks, widening


def sheets(values: dict[str, np.ndarray], weights: np.ndarray | None = None) -> Sheets:
    rows = next(iter(values.values())).shape[1]
    seeds = {label: list(range(len(array))) for label, array in values.items()}
    return Sheets(values, seeds, np.ones(rows) if weights is None else weights)


def test_interval_agrees_with_resampling_by_hand() -> None:
    draw = np.random.default_rng(0)
    losses, tokens = draw.gamma(2.0, size=(1, 40)), draw.integers(1, 6, size=40).astype(float)
    found = interval(sheets({"a": losses}, tokens), "a")
    means = []
    for _ in range(10_000):
        rows = draw.integers(0, 40, size=40)
        means.append(losses[0, rows].sum() / tokens[rows].sum())
    middle = losses.sum() / tokens.sum()
    spread = widening(40) * (np.percentile(means, [2.5, 97.5]) - middle)
    assert found == pytest.approx(middle + spread, rel=0.02)


def test_what_does_not_vary_still_has_an_interval() -> None:
    for wrong in (np.zeros((1, 100)), np.zeros((2, 100))):
        low, high = interval(sheets({"a": wrong}), "a")
        assert low == 0
        assert high == pytest.approx(0.037, abs=0.001)
    one = np.array([[1.0] * 60 + [0.0] * 40])
    assert interval(sheets({"a": one}), "a") == pytest.approx((0.502, 0.691), abs=0.001)


def test_intervals_of_few_rows_are_as_wide_as_students() -> None:
    for n, factor in ((4, 3.182446), (10, 2.262157), (30, 2.045230), (1000, 1.962341)):
        assert widening(n) == pytest.approx((n / (n - 1)) ** 0.5 * factor / 1.959964, rel=0.04)
    draw = np.random.default_rng(3)
    held = [_holds_zero(draw.normal(size=6)) for _ in range(300)]
    assert 0.92 <= np.mean(held) <= 0.98  # a plain bootstrap holds it in about 85 % of the cases


def _holds_zero(values: Any) -> bool:
    low, high = interval(Sheets({"a": values[None]}, {"a": [0]}, np.ones(len(values))), "a", count=2000)
    return bool(low <= 0 <= high)


def test_p_value_agrees_with_all_resamples_of_few_rows() -> None:
    a, b = np.array([[1.0, 1, 0, 1, 1, 0]]), np.array([[0.0, 1, 0, 0, 1, 0]])
    delta = (a - b)[0]
    every = np.array([delta[list(rows)].mean() for rows in itertools.product(range(6), repeat=6)])
    expected = (widening(6) * np.abs(every - delta.mean()) >= abs(delta.mean()) - 1e-12).mean()
    (found,) = differences(sheets({"a": a, "b": b}), 0.05)
    assert found.value == pytest.approx(delta.mean())
    assert found.p == pytest.approx(expected, abs=0.015)


def test_pairing_finds_what_unpaired_intervals_hide() -> None:
    draw = np.random.default_rng(1)
    hard = draw.normal(size=(1, 200)) * 5  # rows differ much more than methods do
    both = sheets({"a": hard, "b": hard + 0.5 + 0.1 * draw.normal(size=(1, 200))})
    (found,) = differences(both, 0.05)
    assert found.distinct
    low, high = interval(both, "b")
    assert low < both.mean("a") < high


def test_equal_methods_are_rarely_called_different_and_seeds_count() -> None:
    draw = np.random.default_rng(2)
    wrong = 0
    for i in range(80):  # truth: no difference, but every seed shifts a method as a whole
        made = {m: draw.normal(size=(5, 60)) * 0.3 + draw.normal(size=(5, 1)) * 0.3 for m in "ab"}
        (found,) = differences(sheets(made), 0.05, seed=i)
        wrong += found.p < 0.05
    assert wrong <= 16  # rows alone would call most of them different
    alone = 0
    for i in range(30):
        made = {m: draw.normal(size=(5, 60)) * 0.3 + draw.normal(size=(5, 1)) * 0.3 for m in "ab"}
        one = {m: array.mean(axis=0, keepdims=True) for m, array in made.items()}
        alone += differences(sheets(one), 0.05, seed=i)[0].p < 0.05
    assert alone / 30 > wrong / 80


def test_only_common_seeds_are_compared() -> None:
    values = {"a": np.array([[1.0, 1.0], [0.0, 0.0]]), "b": np.array([[1.0, 1.0]])}
    made = Sheets(values, {"a": [0, 1], "b": [0]}, np.ones(2))
    (found,) = differences(made, 0.05)
    assert found.value == 0
    apart = Sheets(values, {"a": [0, 1], "b": [7]}, np.ones(2))
    assert differences(apart, 0.05) == []


def test_an_untrained_model_stands_for_every_seed() -> None:
    values = {"untrained": np.zeros((1, 50)), "a": np.ones((2, 50))}
    (found,) = differences(Sheets(values, {"untrained": [], "a": [0, 1]}, np.ones(50)), 0.05)
    assert found.value == -1
    assert found.distinct


def test_many_pairs_can_still_be_told_apart() -> None:
    draw = np.random.default_rng(3)
    made = {f"m{i}": draw.normal(size=(1, 80)) * 0.01 + i for i in range(20)}
    assert all(d.distinct for d in differences(sheets(made), 0.05))


def test_holm_by_its_definition() -> None:
    values = [0.01, 0.04, 0.03, 0.005]
    expected = [0.03, 0.06, 0.06, 0.02]  # sorted: 0.005*4, 0.01*3, 0.03*2, then 0.04*1 raised to the one before
    assert holm(values) == pytest.approx(expected)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def pair(a: str, b: str, distinct: bool) -> Difference:
    return Difference(a=a, b=b, value=0.1, interval=(0, 1), p=0.01, p_holm=0.02, distinct=distinct)


def test_ranks_are_shared_by_what_cannot_be_told_apart() -> None:
    found = [pair("a", "b", False), pair("a", "c", True), pair("b", "c", False), pair("c", "d", False)]
    found += [pair("a", "d", True), pair("b", "d", True)]
    assert ranks(["a", "b", "c", "d"], found) == {"a": 1, "b": 1, "c": 3, "d": 3}
    assert ranks(["a", "b"], [pair("a", "b", True)]) == {"a": 1, "b": 2}


def test_a_few_references_give_what_all_pairs_give_of_them() -> None:
    draw = np.random.default_rng(2)
    made = sheets({name: draw.normal(i / 3, 1, size=(3, 40)) for i, name in enumerate("abcdef")})
    every = {(d.a, d.b): d for d in differences(made, 0.05, count=4000)}
    some = differences(made, 0.05, references=("b", "e"), count=4000)
    assert len(some) == 1 + 2 * 4
    for d in some:
        turned = d.a > d.b  # a reference comes first
        same = every[(d.b, d.a) if turned else (d.a, d.b)]
        assert (d.value, d.p) == (pytest.approx(-same.value if turned else same.value), same.p)
        assert d.p_holm <= same.p_holm, "fewer pairs are corrected for"


def test_draws_do_not_depend_on_who_else_is_drawn() -> None:
    draw = np.random.default_rng(4)
    values = {name: draw.normal(size=(seeds, 30)) for name, seeds in (("a", 1), ("b", 4), ("c", 2))}
    together, alone = sheets(values), sheets(values)
    keys = [(label, tuple(together.seeds[label])) for label in values]
    together.resample(keys, 5000, 0)
    for key in keys:
        assert np.array_equal(together.draws(*key, 5000, 0), alone.draws(*key, 5000, 0))


def test_without_all_pairs_a_rank_is_shared_with_references_alone() -> None:
    found = [pair("a", "b", False), pair("a", "c", True), pair("a", "d", True), pair("a", "u", True)]
    found += [pair("u", "b", True), pair("u", "c", True), pair("u", "d", True), pair("u", "e", False)]
    found += [pair("a", "e", True)]
    assert ranks(["a", "b", "c", "d", "u", "e"], found, ("a", "u")) == {"a": 1, "b": 1, "c": 3, "d": 4, "u": 5, "e": 5}
