"""How long token rows are, and in which order they may come, wherever they are: in a list, or made when asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from adapterlab.data.mixture import Mixture
from adapterlab.data.streams import STREAMED
from adapterlab.data.views import Joined, Lookup, Picked
from adapterlab.evaluate.prepared import Prepared

Row = Mapping[str, Sequence[int]]


class _Lengths(Lookup[int]):
    """Tokens of each row, looked up one by one."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, index: int) -> int:
        """Return the tokens of a row."""
        return len(self.rows[index]["input_ids"])


def lengths_of(rows: Sequence[Row], *, now: bool = False) -> Sequence[int]:
    """Return the tokens of each row.

    Args:
        rows: token rows.
        now: look at all of them, where they could be looked up one by one.
    """
    if isinstance(rows, Prepared) and now:
        return rows.all_lengths()  # type: ignore[return-value]
    if isinstance(rows, (Prepared, *STREAMED)):
        return _Lengths(rows)
    if isinstance(rows, Joined):
        return Joined([lengths_of(part, now=now) for part in rows.parts])
    if isinstance(rows, Picked):
        return Picked(lengths_of(rows.whole, now=now), rows.places)
    return [len(row["input_ids"]) for row in rows]


def longest_of(rows: Sequence[Row]) -> int:
    """Return the tokens of the longest row, or a bound where rows are made when they are asked for."""
    if isinstance(rows, (Prepared, *STREAMED)):
        return rows.bound
    if isinstance(rows, Joined):
        return max(map(longest_of, rows.parts), default=0)
    return longest_of(rows.whole) if isinstance(rows, Picked) else max(lengths_of(rows), default=0)


def by_length(rows: Sequence[Row]) -> list[int]:
    """Return the places of rows, the longest first; those of one length stay in their order."""
    lengths = np.fromiter(lengths_of(rows, now=True), np.int64, len(rows))
    found: list[int] = np.argsort(-lengths, kind="stable").tolist()
    return found


def unchecked(rows: Sequence[Row]) -> Sequence[Row]:
    """Return those rows whose token ids nobody has looked at: what is made when it is asked for is checked then."""
    if isinstance(rows, (Prepared, *STREAMED)):
        return ()
    if isinstance(rows, Joined):
        return [row for part in rows.parts for row in unchecked(part)]
    return unchecked(rows.whole) if isinstance(rows, Picked) else rows


def stages_of(rows: Sequence[Row]) -> tuple[int, ...] | None:
    """Return how many rows of each part of a pass are over before the next begins; None: rows come as they stand."""
    if isinstance(rows, STREAMED):
        return None
    return rows.stages if isinstance(rows, Mixture) else ()
