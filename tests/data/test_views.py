"""Views against lists that hold the same."""

from __future__ import annotations

import random

import pytest

from adapterlab.data.views import Joined, Others, Picked


@pytest.mark.parametrize("seed", range(5))
def test_others_are_the_numbers_that_are_left(seed: int) -> None:
    draw = random.Random(seed)
    without = draw.sample(range(40), draw.randrange(0, 39))
    found, expected = Others(40, without), [i for i in range(40) if i not in without]
    assert [*found] == expected
    assert [found[i] for i in range(len(found))] == expected
    assert [*found[1:9:2]] == expected[1:9:2]
    assert not expected or found[-1] == expected[-1]
    with pytest.raises(IndexError):
        found[len(found)]


def test_joined_and_picked_are_what_lists_are() -> None:
    parts = [["a", "b"], [], ["c"], ["d", "e", "f"]]
    joined = Joined(parts)
    flat = [item for part in parts for item in part]
    assert [*joined] == flat
    assert [joined[i] for i in range(-6, 6)] == flat + flat
    assert [*joined[::-1][1:4]] == flat[::-1][1:4]
    assert [*Picked(joined, [5, 0, 0])] == ["f", "a", "a"]
    assert [*joined.block(1, 5)] == flat[1:5]
    assert len(Joined([])) == 0
