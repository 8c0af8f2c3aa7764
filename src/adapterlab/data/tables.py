"""Rows that stay on the disk: what is too large to hold becomes an Arrow table of `datasets`, mapped into memory.

Rows of JSON and of separated values are kept as the text they are and read when somebody asks for one. `datasets` has
readers for them too, but those give all values of a column one type: 3.10 becomes 3.1, a date in a text becomes a time,
objects get each other's fields, and files whose rows differ are refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from adapterlab.data.formats import SourceRow
from adapterlab.data.readers import row_of, texts, unfilled
from adapterlab.data.views import Lookup
from adapterlab.errors import DataError, OutputError

_FORMAT = 1  # of the kept tables; a new number makes them anew
_BLOCK = 4096  # rows of a record batch
_SLICE = 1024  # rows that are hashed at once
_FEATURES = {"file": datasets.Value("string"), "number": datasets.Value("int64"), "row": datasets.Value("large_string")}


class _Texts(datasets.ArrowBasedBuilder):
    """Keeps the rows of text files."""

    files: Sequence[Path] = ()

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=datasets.Features(_FEATURES))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train", gen_kwargs={"files": tuple(self.files)})]

    def _generate_tables(self, files: Sequence[Path]) -> Iterator[tuple[int, pa.Table]]:
        key, digest = itertools.count(), hashlib.sha256()
        for file in files:
            rows = texts(file)
            while block := [*itertools.islice(rows, _BLOCK)]:
                numbers, written = zip(*block, strict=True)
                digest.update("\n".join(written).encode() + b"\n")
                columns = {"file": [str(file)] * len(block), "number": numbers, "row": written}
                yield next(key), pa.table(columns, schema=self.info.features.arrow_schema)
        self.info.description = digest.hexdigest()  # kept with the table, which need not be read for it


class Table(Lookup[SourceRow]):
    """The rows of a `datasets.Dataset`.

    Attributes:
        data: the data set.
        source: where it comes from.
        written: whether its rows are texts that `row_of` reads.
    """

    def __init__(self, data: datasets.Dataset, source: str, *, written: bool = False):
        self.data, self.source, self.written = data, source, written
        self._digest = ""

    def __len__(self) -> int:
        return len(self.data)

    def at(self, index: int) -> SourceRow:
        """Return a row."""
        return self._row(self.data[index], index)

    def block(self, start: int, stop: int) -> list[SourceRow]:
        """Return rows that stand behind each other."""
        columns = self.data[start:stop]
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [self._row(row, i) for i, row in enumerate(rows, start)]

    def __iter__(self) -> Iterator[SourceRow]:
        for start in range(0, len(self), _SLICE):
            yield from self.block(start, min(start + _SLICE, len(self)))

    def _row(self, found: dict[str, Any], index: int) -> SourceRow:
        if not self.written:
            return SourceRow(self.source, index + 1, unfilled(found))
        file, number = found["file"], found["number"]
        return SourceRow(Path(file).name, number, row_of(found["row"], number, file))

    def first(self, limit: int | None) -> Table:
        """Return the first rows."""
        if limit is None or limit >= len(self):
            return self
        return Table(self.data.select(range(limit)), self.source, written=self.written)

    def digest(self) -> str:
        """Hash what the rows say; not where they came from, nor how the table is cut into batches."""
        self._digest = self._digest or self._hashed()
        return self._digest

    def _hashed(self) -> str:
        if self.written:
            return f"{self.data.info.description} {len(self)}"
        found = hashlib.sha256()
        arrow = self.data.data.table if self.data._indices is None else self.data.flatten_indices().data.table
        for start in range(0, arrow.num_rows, _SLICE):
            for batch in arrow.slice(start, _SLICE).combine_chunks().to_batches():
                found.update(batch.serialize())
        return found.hexdigest()


def kept(files: Sequence[Path]) -> Table:
    """Return the rows of local files that say no types, kept in the cache of `datasets`.

    Two processes that ask at once wait for each other; a killed one leaves nothing that counts.

    Raises:
        DataError: a file is damaged.
        OutputError: the cache cannot be written.
    """
    with _explained():
        builder = _Texts(dataset_name="adapterlab_rows", hash=_stamp(files))
        builder.files = files
        with _bars():
            builder.download_and_prepare()
        try:
            data = builder.as_dataset(split="train")
        except (pa.ArrowException, OSError):  # damaged: the files are still there
            builder.download_and_prepare(download_mode="force_redownload")
            data = builder.as_dataset(split="train")
    return Table(data, files[0].name, written=True)


def typed(files: Sequence[Path], source: str) -> Table:
    """Return the rows of local Parquet or Arrow files of one kind.

    Raises:
        DataError: a file is damaged.
        OutputError: the cache cannot be written.
    """
    with _explained():
        kind = files[0].suffix.lower().removeprefix(".")
        # The stamp is a part of the key: `datasets` alone looks at the time to the second.
        names = {f"rows_{_stamp(files)[:16]}": [str(file) for file in files]}
        with _bars():
            data = datasets.load_dataset(kind, data_files=names, split=next(iter(names)))
    return Table(data, source)


def from_disk(folder: Path, split: str | None) -> Table:
    """Return the rows of a folder that `save_to_disk` wrote.

    Raises:
        DataError: it is damaged, or has no such split.
    """
    try:
        data = datasets.load_from_disk(str(folder))
        data = data[split or "train"] if isinstance(data, datasets.DatasetDict) else data
    except KeyError:
        raise DataError(f"{folder} has the splits {', '.join(data)}, and no {split!r}. Set data.split.") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{folder} cannot be read as a data set of `datasets`: {error}.") from None
    return Table(data, folder.name)


def _stamp(files: Sequence[Path]) -> str:
    """Tell apart what files hold now from what they held before."""
    facts = [(str(f.resolve()), (found := f.stat()).st_size, found.st_mtime_ns, found.st_ino) for f in files]
    return hashlib.sha256(repr([_FORMAT, facts]).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """Show the bars of `datasets` to people only."""
    off = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if off:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if off:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say what is wrong with a file, or with the cache."""
    cache = str(datasets.config.HF_DATASETS_CACHE)
    try:
        yield
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error.__context__ or error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise _unwritable(cache, cause) from None
        if isinstance(cause, DataError):
            raise cause from None
        raise DataError(f"The rows cannot be read: {cause}. Write the file again.") from None
    except OSError as error:
        raise _unwritable(cache, error) from None


def _unwritable(cache: str, error: OSError) -> OutputError:
    return OutputError(
        f"{cache} cannot be used: {error.strerror or error}. Rows that are too many to hold are kept there, in about "
        "the room of their files. Make room, set HF_DATASETS_CACHE to a folder on another disk, or set data.streaming."
    )
