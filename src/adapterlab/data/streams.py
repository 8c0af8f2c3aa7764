"""Rows that are read while a run goes on, and not kept: a sequence that is cheap to walk through, window by window.

Which row comes when depends on the seed and the position alone. A resumed run skips what came before its position, so
it needs nothing from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from adapterlab.data.config import WINDOW, DataConfig
from adapterlab.data.formats import Columns, Example, Layout, Numbers, SourceRow, layout_of
from adapterlab.data.sources import files_behind, stream_rows
from adapterlab.data.views import Lookup
from adapterlab.errors import DataError

FIRST = 1000  # rows that tell the format, and whether a resumed run sees the same source


class Stream(Lookup[Any]):
    """The rows of a source over and over, shuffled within windows, and what is made of them.

    Attributes:
        cfg: the source, the size of a window and the seed.
        layout: how rows become examples.
        revision: the commit of a hub data set that is read from beginning to end.
        files: the local files that are read, which must stay what they are.
        first: the first raw rows.
        columns: those that were read so far.
        held: rows at the beginning that are held out.
        total: rows that the sequence has: as many as a run asks for.
        bound: no row is longer, in tokens.
        make: from the examples of a window to what stands at its places.
    """

    def __init__(self, cfg: DataConfig, numbers: Numbers | None, held: int, revision: str | None = None):
        self.cfg, self.held, self.total, self.revision = cfg, held, 0, revision
        self.files = files_behind(str(cfg.path), cfg.split)
        self.first = [*islice(self._source(0), FIRST)]
        if len(self.first) <= held:
            raise DataError(
                f"{cfg.path} has {len(self.first)} rows, of which {held} are held out: none is left to train on. Lower "
                "data.eval_size."
            )
        self.layout: Layout = layout_of(self.first, cfg, numbers)
        self.columns: Columns = self.layout.read(self.first)[1]
        self.make: Callable[[list[Example]], Sequence[Any]] = lambda examples: examples
        self.size = cfg.window or WINDOW
        self.bound = cfg.max_length
        self._rows: int | None = None  # of the source after those that are held out, once they are known
        self._reading: tuple[int, Iterator[SourceRow]] | None = None  # the next window, and what it comes from
        self._window: tuple[int, Sequence[Any]] = (-1, ())

    def __len__(self) -> int:
        return self.total

    def at(self, index: int) -> Any:
        """Return what stands at a position; the windows before it are passed over."""
        number, place = divmod(index, self.size)
        if self._window[0] != number:
            self._window = number, self._made(number)
        made = self._window[1]
        return made[place % len(made)]  # where rows were dropped, others of the window take their places

    def _made(self, number: int) -> Sequence[Any]:
        if self._reading is None or self._reading[0] != number:
            self._reading = number, self._from(number * self.size)
        try:
            raw = [*islice(self._reading[1], self.size)]
        finally:
            self.files.check()  # what was read from a file that changed meanwhile is nobody's, damaged or not
        self._reading = number + 1, self._reading[1]
        order = np.random.default_rng([self.cfg.seed, number]).permutation(len(raw))
        examples, columns = self.layout.read([raw[i] for i in order])
        self.columns = self.columns.joined(columns)
        if made := self.make(examples):
            return made
        raise DataError(
            f"None of the {len(raw)} rows from row {raw[0].number} of {raw[0].file} on can be trained. Check them, or "
            "raise data.max_length."
        )

    def _from(self, position: int) -> Iterator[SourceRow]:
        """All rows from a position on, the source over and over."""
        while True:
            start = position if self._rows is None else position % self._rows
            seen = 0
            for row in self._source(self.held + start):
                seen += 1
                yield row
            if self._rows is None:
                self._rows = start + seen if seen else sum(1 for _ in self._source(self.held))
            position = position if not seen and start else 0

    def _source(self, skip: int) -> Iterator[SourceRow]:
        cfg = self.cfg
        return stream_rows(
            str(cfg.path), split=cfg.split, name=cfg.name, revision=self.revision, limit=cfg.limit, skip=skip
        )

    def head(self, rows: int) -> list[Example]:
        """Return the first examples of the source, in its order."""
        raw = self.first[:rows] if rows <= len(self.first) else [*islice(self._source(0), rows)]
        return self.layout.read(raw)[0] if raw else []

    def digest(self) -> str:
        """Return the rows by which a resumed run knows the source again."""
        return repr([row.values for row in self.first])


class Streams(Lookup[Any]):
    """Several streams, of which each position draws one by weight; each begins again where it ends.

    Attributes:
        streams: the streams.
        shares: how often each is drawn.
        seed: of the draw.
        total: rows that the sequence has: as many as a run asks for.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float], seed: int):
        self.streams, self.seed, self.total = streams, seed, 0
        self.shares = np.array(weights) / sum(weights)
        self._before = [np.zeros(len(streams), np.int64)]  # rows of each that the windows before each one drew
        self._drawn: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    @property
    def bound(self) -> int:
        """No row is longer, in tokens."""
        return max(stream.bound for stream in self.streams)

    def __len__(self) -> int:
        return self.total

    def at(self, index: int) -> Any:
        """Return what stands at a position."""
        window, place = divmod(index, WINDOW)
        while len(self._before) <= window:
            drawn = self._draw(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(drawn, minlength=len(self.streams)))
        if self._drawn[0] != window:
            self._drawn = window, self._draw(window)
        chosen = self._drawn[1]
        stream = self.streams[which := int(chosen[place])]
        return stream.at(int(self._before[window][which] + np.count_nonzero(chosen[:place] == which)))

    def _draw(self, window: int) -> np.ndarray:
        draw = np.random.default_rng([self.seed, window])
        return draw.choice(len(self.streams), size=WINDOW, p=self.shares)

    def digest(self) -> str:
        """Return the rows by which a resumed run knows the sources again."""
        return repr([[stream.digest() for stream in self.streams], self.shares.tolist(), self.seed])


STREAMED = (Stream, Streams)
