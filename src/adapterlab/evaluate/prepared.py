"""Token rows of many examples: made when they are asked for, here or by processes beside, and kept on the disk.

The files of a source are found by whoever encodes the same rows with the same tokenizer, template and settings: a
second run, a resumed one, the other processes of a run. What no file holds yet is encoded row by row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from adapterlab import data as data_package
from adapterlab.data.encoding import Encoder
from adapterlab.data.formats import Columns, Example, Examples
from adapterlab.data.report import Encoded, Report
from adapterlab.data.splits import fingerprint
from adapterlab.data.views import Joined, Lookup, Picked
from adapterlab.data.vocabulary import Tables, check_within
from adapterlab.evaluate.filling import Filling, helpers
from adapterlab.evaluate.shards import SIZE, Shard, Shards, shard_of
from adapterlab.json_text import digest
from adapterlab.paths import home

_RECENT = 4096  # rows that are remembered while no file holds them
_WORTH = 4  # files for which another process is started
SAMPLE = 128  # rows that are looked at for what is said before training
# What a row's tokens do not depend on: the rows themselves are hashed, wherever they come from.
_BESIDE = {
    "path", "name", "revision", "task", "task_args", "split", "eval_path", "eval_split", "eval_size", "limit",
    "eval_limit", "scorer", "seed", "sources", "mixing", "streaming", "window",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How examples become the token rows of a model.

    Attributes:
        encoder: makes token rows.
        tables: rows of the model's embedding and output.
        columns: further columns of each row.
        size: rows of the source in a file.
    """

    encoder: Encoder
    tables: Tables
    columns: tuple[str, ...] = ()
    size: int = field(default_factory=lambda: SIZE)

    def made(self, examples: Sequence[Example], *, some: bool = False) -> Encoded:
        """Encode examples.

        Args:
            examples: of one format.
            some: whether they are a part of more.

        Raises:
            DataError: a row cannot be used, or has a token that the model does not know.
        """
        encoded = self.encoder(examples, some=some)
        check_within(self.tables, encoded.rows, self.encoder.tokenizer, [examples[i].row for i in encoded.kept])
        return encoded

    def shard(self, examples: Examples, number: int) -> Shard:
        """Encode the rows of one file."""
        start = number * self.size
        part = examples.block(start, min(len(examples), start + self.size))
        encoded = self.made(part, some=True)
        return shard_of(encoded, len(part), self.columns, examples.columns, self.encoder.unknown)


class Store:
    """The token rows of a source.

    Attributes:
        examples: of all rows of the source.
        recipe: how they are encoded.
        shards: what is encoded.
    """

    def __init__(self, examples: Examples, recipe: Recipe):
        self.examples, self.recipe = examples, recipe
        self.shards = Shards(home() / "rows" / key_of(examples, recipe))
        self._recent: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._filling: Filling | None = None
        self.made = functools.partial(recipe.shard, examples)  # what a file holds, by its number

    @property
    def files(self) -> int:
        """How many files hold all rows."""
        return -(-len(self.examples) // self.recipe.size)

    def row(self, index: int) -> dict[str, Any]:
        """Return a row of the source; an empty one if it was dropped.

        Raises:
            DataError: it cannot be used, or another one cannot that was met beside.
        """
        if self._filling is not None:
            self._filling.heed()
        if index in self._recent:
            return self._recent[index]
        number, place = divmod(index, self.recipe.size)
        if (shard := self.shards.get(number)) is not None:
            return shard.row(place)
        self.remember([index], self.recipe.made([self.examples[index]], some=True))
        return self._recent[index]

    def remember(self, places: Sequence[int], encoded: Encoded) -> None:
        """Keep rows that were encoded one by one for a while."""
        made = dict(zip(encoded.kept, encoded.rows, strict=True))
        for i, place in enumerate(places):
            self._recent[place] = made.get(i, {"input_ids": [], "labels": []})
        while len(self._recent) > max(_RECENT, len(places)):
            self._recent.popitem(last=False)

    def begin(self) -> None:
        """Let other processes encode what no file holds yet, and go on meanwhile."""
        missing = self._missing()
        if len(missing) >= _WORTH and helpers() and not self.shards.full and self._filling is None:
            self._filling = Filling(self.made, self.shards.folder, missing)
            weakref.finalize(self, self._filling.close)

    def close(self) -> None:
        """End the processes beside; their files stay."""
        if self._filling is not None:
            self._filling.close()
            self._filling = None

    def complete(self) -> None:
        """Encode all rows, with other processes where there are cores for them.

        Raises:
            DataError: some row cannot be used.
        """
        from rich.progress import track

        from adapterlab.terminal import Terminal

        if not (missing := self._missing()):
            return
        self.begin()
        try:
            # From the other end, so that nobody does what another one does.
            console = Terminal(stderr=True)
            for number in track(missing[::-1], "Tokenising rows", transient=True, console=console):
                if self._filling is not None:
                    self._filling.heed()
                if not self.shards.has(number):
                    self.shards.put(number, self.made(number))
        finally:
            self.close()

    def _missing(self) -> list[int]:
        return [number for number in range(self.files) if not self.shards.has(number)]

    def shard(self, number: int) -> Shard:
        """Return a file's rows, made here if need be."""
        if (found := self.shards.get(number)) is None:
            found = self.made(number)
            self.shards.put(number, found)
        return found


class Prepared(Lookup[dict[str, Any]]):
    """Some token rows of a store.

    Attributes:
        store: of all rows of the source.
        places: which of them.
        bound: no row is longer, in tokens.
    """

    def __init__(self, store: Store, places: Sequence[int]):
        self.store, self.places, self.bound = store, places, store.recipe.encoder.limit

    def __len__(self) -> int:
        return len(self.places)

    def at(self, index: int) -> dict[str, Any]:
        """Return a row."""
        return self.store.row(int(self.places[index]))

    def all_lengths(self) -> np.ndarray:
        """Return the tokens of each row; this encodes all of them.

        Raises:
            DataError: some row cannot be used.
        """
        self.store.complete()
        every = np.concatenate([self.store.shard(number).lengths() for number in range(self.store.files)])
        return np.asarray(every[np.fromiter(self.places, np.int64, len(self.places))])

    def sampled(self) -> Report:
        """Report on the first rows."""
        first = [self.places[i] for i in range(min(SAMPLE, len(self)))]
        encoded = self.store.recipe.made([self.store.examples[i] for i in first], some=True)
        self.store.remember(first, encoded)
        return dataclasses.replace(encoded.report, pending=len(self) - len(first))

    def report(self) -> Report:
        """Report on all rows that are encoded; those that are not are only counted."""
        size, places = self.store.recipe.size, np.sort(np.fromiter(self.places, np.int64, len(self.places)))
        bounds = np.searchsorted(places, np.arange(self.store.files + 1) * size)
        parts = []
        for number in range(self.store.files):
            chosen = np.zeros(min(size, len(self.store.examples) - number * size), bool)
            chosen[places[bounds[number] : bounds[number + 1]] % size] = True
            shard = self.store.shards.get(number) if chosen.any() else None
            if shard is not None:
                parts.append(shard.report(chosen, self.bound))
        if not parts:
            return self.sampled()
        found = functools.reduce(Report.joined, parts)
        return dataclasses.replace(found, pending=len(self) - found.rows - found.dropped)

    def columns(self) -> Columns:
        """Say which columns of the source were read, as far as it was."""
        numbers = (number for number in range(self.store.files) if self.store.shards.has(number))
        shards = filter(None, map(self.store.shards.get, numbers))
        return functools.reduce(Columns.joined, (shard.columns for shard in shards), self.store.examples.columns)


@contextlib.contextmanager
def beside(rows: Sequence[Any]) -> Iterator[None]:
    """Let other processes encode, while this context lasts, those of the rows that nobody has encoded yet."""
    stores = [part.store for part in _prepared(rows)]
    for store in stores:
        store.begin()
    try:
        yield
    finally:
        for store in stores:
            store.close()


def final(rows: Sequence[Any]) -> tuple[Report, Columns] | None:
    """Report on rows as far as they are encoded, and say which columns they have; None for rows in memory."""
    found = [(part.report(), part.columns()) for part in _prepared(rows)]
    if not found:
        return None
    reports, columns = zip(*found, strict=True)
    return functools.reduce(Report.joined, reports), functools.reduce(Columns.joined, columns)


def _prepared(rows: Sequence[Any]) -> list[Prepared]:
    if isinstance(rows, Joined):
        return [found for part in rows.parts for found in _prepared(part)]
    if isinstance(rows, Picked):
        return _prepared(rows.whole)
    return [rows] if isinstance(rows, Prepared) else []


def key_of(examples: Examples, recipe: Recipe) -> str:
    """Return what is the same for whoever gets the same token rows.

    It depends on the rows, the tokenizer with its template, the settings, the tables of the model, and the version of
    what encodes.
    """
    encoder, layout = recipe.encoder, examples.layout
    settings = [
        {k: v for k, v in cfg.model_dump(mode="json").items() if k not in _BESIDE} for cfg in (encoder.cfg, layout.cfg)
    ]
    parts = [
        fingerprint(examples), layout.name, {k: [*v] for k, v in layout.numbers.items()}, settings, encoder.window,
        encoder.seq2seq, recipe.tables, tokenizer_key(encoder.tokenizer), recipe.size, _code(),
    ]  # fmt: skip
    return digest(parts)[:32]


def tokenizer_key(tokenizer: Any) -> str:
    """Hash all that a tokenizer's ids depend on."""
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    inside = fast.to_str() if hasattr(fast, "to_str") else sorted(tokenizer.get_vocab().items())
    added = {i: repr(token) for i, token in tokenizer.added_tokens_decoder.items()}
    settings = {k: repr(v) for k, v in tokenizer.init_kwargs.items() if not k.endswith(_PLACES)}
    parts = [
        type(tokenizer).__name__, inside, added, settings, tokenizer.special_tokens_map,
        getattr(tokenizer, "chat_template", None),
    ]  # fmt: skip
    return digest(parts)


_PLACES = ("_file", "_path", "_local", "_files_only")  # settings of a tokenizer that say where it came from


@functools.cache
def _code() -> str:
    """Tell apart versions of what encodes."""
    folder = Path(str(data_package.__file__)).parent
    sources = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    return hashlib.sha256(sources + f"{version('transformers')} {version('tokenizers')}".encode()).hexdigest()
