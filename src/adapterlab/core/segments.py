"""Who owns which part of a batch: one immutable map a step, and what modules derive from it, worked out once.

The units are rows, or the tokens of all rows behind each other. What a module needs of the map (who is here, which
entries belong together, where they stand afterwards) depends on its adapters alone, so that modules which carry the
same ones share it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from adapterlab.core.composition import Composition, leaves

T = TypeVar("T")
Who = tuple[str, ...] | Composition  # keys of adapters, () being the plain base, or how they are put together


class Segment(NamedTuple):
    """Neighbours that go through the same.

    Attributes:
        who: keys of adapters, or a composition of them.
        start: first unit.
        stop: behind the last one.
    """

    who: Who
    start: int
    stop: int


class Slots(NamedTuple):
    """How entries of several owners are multiplied by what is stacked, a slot for each owner.

    Attributes:
        width: entries of a slot.
        filled: which entry stands in each place of the slots `[slots * width]`, any where an owner has fewer; None: all
            stand there in their order.
        entries: those that stand in slots `[n]`; None: all.
        places: where in the slots each of them stands `[n]`.
        apart: who has so many entries that they are multiplied by themselves, and which.
    """

    width: int
    filled: Tensor | None
    entries: Tensor | None
    places: Tensor | None
    apart: tuple[Segment, ...]


@dataclass(frozen=True)
class Segments:
    """The parts of a batch in their order, without gaps; made by `segments`.

    Attributes:
        parts: neighbours differ in what they go through.
        by_token: the units are tokens, counted over all rows; otherwise they are rows.
        whole_samples: no sample of the batch has several owners.
    """

    parts: tuple[Segment, ...]
    by_token: bool = False
    whole_samples: bool = False
    _derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def total(self) -> int:
        """Number of units."""
        return self.parts[-1].stop if self.parts else 0

    @property
    def owners(self) -> Tensor:
        """The part of each unit `[total]`."""

        def make() -> Tensor:
            counts = torch.tensor([stop - start for _, start, stop in self.parts], dtype=torch.int64)
            return torch.arange(len(self.parts)).repeat_interleave(counts)

        return self.once("owners", make)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return what was worked out under a key, or work it out."""
        return _once(self._derived, key, make)

    def among(self, names: tuple[str, ...]) -> Here:
        """The map as modules with these adapters see it."""
        return self.once(("among", names), lambda: Here(self, names))

    def chosen(self, units: Tensor | slice) -> Segments:
        """The map of some of the units, in their order."""
        where, counts = torch.unique_consecutive(self.owners[units], return_counts=True)
        return segments(zip((self.parts[i].who for i in where), counts.tolist(), strict=True), self.by_token)

    def repeated(self, times: int) -> Segments:
        """The map with so many units in the place of each."""
        return segments(((who, times * (stop - start)) for who, start, stop in self.parts), self.by_token)

    def tokens(self, rows: int, tokens: int) -> Segments:
        """The map by token of a batch of so many rows and tokens in a row; rows of beams are runs of each row."""
        if self.by_token or not self.parts:
            return self
        times = rows // self.total * tokens
        return segments(((who, times * (stop - start)) for who, start, stop in self.parts), by_token=True)

    def settled(self, rows: int, tokens: int, bounds: Tensor | None = None) -> Segments:
        """The same map by row where every row has one owner; it knows then whether samples have one.

        Args:
            rows: of the batch.
            tokens: of each row.
            bounds: borders of samples that are packed behind each other `[samples + 1]`.
        """
        if not self.by_token:
            return self
        edges = None if bounds is None else tuple(bounds.tolist())

        def make() -> Segments:
            by_row = self.owners.view(rows, tokens)
            if tokens and bool((by_row == by_row[:, :1]).all()):
                return segments((self.parts[i].who, 1) for i in by_row[:, 0].tolist())
            whole = edges is not None and {start for _, start, _ in self.parts} <= set(edges)
            return replace(self, whole_samples=whole)

        return self.once(("settled", rows, tokens, edges), make)

    def of_samples(self, bounds: Sequence[int]) -> tuple[Who, ...]:
        """Who owns each of the samples that begin and end at these tokens; they have one owner each."""
        if not self.by_token:
            return (self.parts[0].who,) * (len(bounds) - 1)
        firsts = self.owners[torch.tensor(bounds[:-1]).clamp(max=self.total - 1)].tolist()
        return tuple(self.parts[i].who for i in firsts)


@functools.lru_cache(maxsize=64)  # a map that comes again brings what was derived from it
def _known(parts: tuple[Segment, ...], by_token: bool) -> Segments:
    return Segments(parts, by_token)


def segments(counted: Iterable[tuple[Who, int]], by_token: bool = False) -> Segments:
    """Make a map of parts with so many units each."""
    return _known(_joined(counted), by_token)


def _joined(counted: Iterable[tuple[Who, int]]) -> tuple[Segment, ...]:
    """Put parts behind each other; neighbours that go through the same become one."""
    found: list[Segment] = []
    for who, count in counted:
        start = found[-1].stop if found else 0
        if found and found[-1].who == who:
            found[-1] = found[-1]._replace(stop=start + count)
        elif count:
            found.append(Segment(who, start, start + count))
    return tuple(found)


class Here:
    """A map as the modules with certain adapters see it.

    Attributes:
        segments: the map of the whole model.
        parts: what of it is at these modules.
        used: adapters of at least one part.
        plain: no part has a composition.
        names: the adapters.
        total: number of units.
    """

    def __init__(self, whole: Segments, names: tuple[str, ...]):
        self.segments, self.names = whole, names
        self.parts = _joined((_at_hand(who, names), stop - start) for who, start, stop in whole.parts)
        chosen = {name for part in self.parts for name in names_of(part.who)}
        self.used = tuple(name for name in names if name in chosen)
        self.plain = all(isinstance(part.who, tuple) for part in self.parts)
        self.total = whole.total
        self._derived: dict[Any, Any] = {}

    def groups(self, per: int) -> dict[Who, slice | Tensor]:
        """The entries of each kind of part, with so many entries for each unit: a slice, or their numbers."""

        def make() -> dict[Who, slice | Tensor]:
            spans: dict[Who, list[tuple[int, int]]] = {}
            for who, start, stop in self.parts:
                spans.setdefault(who, []).append((start * per, stop * per))
            return {who: _entries(each) for who, each in spans.items()}

        return self._once(("groups", per), make)

    def back(self, per: int, device: torch.device) -> Tensor | None:
        """Where each entry stands when the groups are put behind each other, or None: in its own place."""

        def make() -> Tensor | None:
            found = self.groups(per).values()
            order = torch.cat([torch.arange(e.start, e.stop) if isinstance(e, slice) else e for e in found])
            return None if torch.equal(order, torch.arange(len(order))) else order.argsort().to(device)

        return self._once(("back", per, device), make)

    def slots(self, owners: tuple[Who, ...], per: int, few: int, device: torch.device) -> Slots:
        """How the entries are multiplied, with so many of them for each unit.

        Args:
            owners: who has a slot, in their order.
            per: entries of a unit.
            few: entries that stand in slots whatever the others have; where slots would mostly be filled up, owners
                of more are multiplied by themselves.
            device: of the entries.
        """

        def make() -> Slots:
            spans = [Segment(who, start * per, stop * per) for who, start, stop in self.parts if who in owners]
            held: dict[Who, list[int]] = {who: [] for who in owners}
            for who, start, stop in spans:
                held[who] += range(start, stop)
            counts = [len(each) for each in held.values()]
            uneven = len(owners) * max(counts) > 2 * sum(counts)
            apart = tuple(span for span in spans if uneven and len(held[span.who]) > few)
            for span in apart:
                held[span.who] = []
            width, everyone = max(map(len, held.values())), list(range(self.total * per))
            filled = [entry for each in held.values() for entry in (each + [0] * width)[:width]]
            if filled == everyone:
                return Slots(width, None, None, None, apart)
            place = {entry: slot * width + i for slot, each in enumerate(held.values()) for i, entry in enumerate(each)}
            entries = sorted(place)
            found = (torch.tensor(t, device=device) for t in (filled, entries, [place[entry] for entry in entries]))
            whole, some, places = found
            return Slots(width, whole, None if entries == everyone else some, places, apart)

        return self._once(("slots", owners, per, few, device), make)

    def inside(self, who: Who) -> Segments:
        """The map of the whole model for the units of one kind alone."""
        return self._of(who, others=False)

    def alone(self, who: Who) -> Segments:
        """The same among all units, of which the others have the plain base."""
        return self._of(who, others=True)

    def _of(self, who: Who, others: bool) -> Segments:
        def make() -> Segments:
            mine = [(part, stop - start, _at_hand(part, self.names) == who) for part, start, stop in whole.parts]
            kept = [(part if own else (), count) for part, count, own in mine if own or others]
            return replace(segments(kept, whole.by_token), whole_samples=whole.whole_samples)

        whole = self.segments
        return self._once(("of", who, others), make)

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        return _once(self._derived, key, make)


def _once(derived: dict[Any, Any], key: Any, make: Callable[[], T]) -> T:
    """Return what was worked out under a key, or work it out; a compiler does so while it traces."""
    if torch.compiler.is_compiling():
        return make()
    if key not in derived:
        derived[key] = make()
    made: T = derived[key]
    return made


def names_of(who: Who) -> tuple[str, ...]:
    """The adapters of a part."""
    return leaves(who) if isinstance(who, Composition) else who


def _at_hand(who: Who, adapters: Sequence[str]) -> Who:
    """What of it is at a module with these adapters."""
    names = tuple(name for name in adapters if name in names_of(who))
    return who if names and isinstance(who, Composition) else names


def _entries(spans: Sequence[tuple[int, int]]) -> slice | Tensor:
    """Entries that follow each other are a view; others are gathered."""
    if all(one[1] == other[0] for one, other in itertools.pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    return torch.cat([torch.arange(*span) for span in spans])
