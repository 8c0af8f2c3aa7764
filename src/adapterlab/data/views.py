"""Sequences that hold no rows: parts of others, and others behind each other, looked up when somebody asks."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar, overload

_Item = TypeVar("_Item", covariant=True)


class Lookup(Sequence[_Item]):
    """A sequence defined by its length and `at`; slices are views, and nothing is copied."""

    def at(self, index: int) -> _Item:
        """Return the item at an index from 0 to the length - 1."""
        raise NotImplementedError

    def block(self, start: int, stop: int) -> Sequence[_Item]:
        """Return items that stand behind each other, where all of them are wanted."""
        return [self.at(index) for index in range(start, stop)]

    @overload
    def __getitem__(self, index: int) -> _Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[_Item]: ...
    def __getitem__(self, index: int | slice) -> _Item | Sequence[_Item]:
        if isinstance(index, slice):
            return Picked(self, range(len(self))[index])
        size = len(self)
        if not -size <= index < size:
            raise IndexError(index)
        return self.at(index % size)

    def __iter__(self) -> Iterator[_Item]:
        return map(self.at, range(len(self)))


class Picked(Lookup[_Item]):
    """Some items of a sequence, in an order of their own.

    Attributes:
        whole: the sequence.
        places: which of its items.
    """

    def __init__(self, whole: Sequence[_Item], places: Sequence[int]):
        self.whole, self.places = whole, places

    def __len__(self) -> int:
        return len(self.places)

    def at(self, index: int) -> _Item:
        """Return an item."""
        return self.whole[int(self.places[index])]


class Others(Lookup[int]):
    """The numbers below `count` without a few of them, in their order."""

    def __init__(self, count: int, without: Iterable[int]):
        self.without = sorted(without)
        self._left = count - len(self.without)
        self._before = [number - i for i, number in enumerate(self.without)]  # how many of ours come before each

    def __len__(self) -> int:
        return self._left

    def at(self, index: int) -> int:
        """Return a number."""
        return index + bisect_right(self._before, index)


class Joined(Lookup[_Item]):
    """Sequences behind each other.

    Attributes:
        parts: the sequences.
    """

    def __init__(self, parts: Sequence[Sequence[_Item]]):
        self.parts = [part for part in parts if len(part)]
        self._ends = [*accumulate(map(len, self.parts))]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def at(self, index: int) -> _Item:
        """Return an item."""
        part = bisect_left(self._ends, index + 1)
        return self.parts[part][index - (self._ends[part - 1] if part else 0)]


def block_of(items: Sequence[Any], start: int, stop: int) -> Sequence[Any]:
    """Return items that stand behind each other, whatever holds them."""
    return items.block(start, stop) if isinstance(items, Lookup) else items[start:stop]
