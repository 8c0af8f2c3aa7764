"""Which rows come when: a pure function of seed and position, so that a resumed run needs no more than its step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

WINDOW = 50  # steps whose rows are grouped by length together


def shuffled(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return the row indices of one epoch in a random order."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def order(lengths: Sequence[int], seed: int, epoch: int, group: int = 0) -> list[int]:
    """Return the row indices of one epoch in the order of training.

    Args:
        lengths: tokens of each row.
        seed: of the run.
        epoch: counted from 0.
        group: rows of like length to keep together, which are drawn from windows of `WINDOW` times as many; 0: none.
    """
    draw = np.random.default_rng([seed, epoch])
    permutation: list[int] = draw.permutation(len(lengths)).tolist()
    if not group:
        return permutation
    groups: list[list[int]] = []
    for start in range(0, len(permutation), group * WINDOW):
        window = sorted(permutation[start : start + group * WINDOW], key=lambda i: -lengths[i])
        groups += [window[i : i + group] for i in range(0, len(window), group)]
    # The smaller group at the end stays there, so that the others fill whole steps.
    shuffled = [groups[i] for i in draw.permutation(len(groups) - 1)] + groups[-1:]
    return [row for part in shuffled for row in part]


@dataclass
class Sampler:
    """The stream of rows, epoch after epoch, cut into steps and batches.

    Attributes:
        lengths: tokens of each row.
        seed: of the order.
        batch_size: rows of a batch.
        batches: batches of a step, over all processes.
        limit: rows after which the stream ends, or None.
        group: keep rows of like length together in a step.
        whole: every step consists of all rows, in as many batches as that takes.
        stages: rows of each part of a pass that is over before the next begins; (): one; None: rows come as they stand.
    """

    lengths: Sequence[int]
    seed: int
    batch_size: int
    batches: int
    limit: int | None = None
    group: bool = False
    whole: bool = False
    stages: Sequence[int] | None = ()
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def per_step(self) -> int:
        """Rows of a whole step."""
        return len(self.lengths) if self.whole else self.batch_size * self.batches

    def epoch(self, step: int) -> float:
        """Passes over the data when `step` steps are done."""
        rows = step * self.per_step
        return (rows if self.limit is None else min(rows, self.limit)) / len(self.lengths)

    def step(self, step: int) -> list[list[int]]:
        """Return the row indices of each batch of a step (counted from 0); the last step may be smaller.

        Rows of like length share a batch: the step's gradient is that of all its rows, whatever batch they are in.
        """
        start = step * self.per_step
        end = start + self.per_step if self.limit is None else min(start + self.per_step, self.limit)
        rows = sorted((self._row(position) for position in range(start, end)), key=lambda i: -self.lengths[i])
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def _row(self, position: int) -> int:
        if self.stages is None:
            return position
        epoch, index = divmod(position, len(self.lengths))
        if epoch not in self._epochs:
            self._epochs = {k: v for k, v in self._epochs.items() if k == epoch - 1}
            self._epochs[epoch] = self._order(epoch)
        return int(self._epochs[epoch][index])

    def _order(self, epoch: int) -> np.ndarray:
        found, start = [], 0
        for rows in self.stages or [len(self.lengths)]:
            if self.group:
                part = np.array(order(self.lengths[start : start + rows], self.seed, epoch, self.per_step))
            else:
                part = shuffled(rows, self.seed, epoch)
            found.append(start + part)
            start += rows
        return found[0] if len(found) == 1 else np.concatenate(found)
