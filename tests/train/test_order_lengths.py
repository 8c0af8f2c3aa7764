"""Rows of like length share a batch, and perhaps a step; which rows come when depends on seed and position alone."""

from __future__ import annotations

import random
from itertools import chain

import pytest

from adapterlab.train.sampler import WINDOW, Sampler, order

DRAW = random.Random(0)
LENGTHS = [DRAW.randrange(1, 100) for _ in range(1003)]


def test_batches_of_a_step_are_sorted_and_the_step_keeps_its_rows() -> None:
    sampler = Sampler(LENGTHS, seed=1, batch_size=4, batches=3)
    epoch = order(LENGTHS, 1, 0)
    for step in range(5):
        batches = sampler.step(step)
        rows = [*chain.from_iterable(batches)]
        assert sorted(rows) == sorted(epoch[12 * step : 12 * step + 12])
        assert [LENGTHS[i] for i in rows] == sorted((LENGTHS[i] for i in rows), reverse=True)
        assert [len(batch) for batch in batches] == [4, 4, 4]


@pytest.mark.parametrize("group", [1, 8, 600, 5000])
def test_grouping_keeps_every_row_once_and_depends_on_seed_and_epoch(group: int) -> None:
    found = order(LENGTHS, 3, 2, group)
    assert sorted(found) == [*range(len(LENGTHS))]
    assert found == order(LENGTHS, 3, 2, group)
    assert found != order(LENGTHS, 4, 2, group)
    if group < 600:
        assert found != order(LENGTHS, 3, 3, group)


def test_grouped_steps_have_rows_of_like_length_and_come_in_random_order() -> None:
    def spread(group: bool) -> float:
        sampler = Sampler(LENGTHS, seed=0, batch_size=4, batches=2, group=group)
        steps = [[LENGTHS[i] for batch in sampler.step(s) for i in batch] for s in range(len(LENGTHS) // 8)]
        return sum(max(lengths) - min(lengths) for lengths in steps) / len(steps)

    assert spread(True) < spread(False) / 5
    grouped = Sampler(LENGTHS, seed=0, batch_size=4, batches=2, group=True)
    longest = [LENGTHS[grouped.step(s)[0][0]] for s in range(WINDOW)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)
    later = Sampler(LENGTHS, seed=0, batch_size=4, batches=2, group=True)
    assert later.step(130) == [grouped.step(s) for s in range(131)][-1], "a resumed run needs its step alone"
