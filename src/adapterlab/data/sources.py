"""Where raw rows come from: local files, folders of them, and the Hugging Face hub."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from adapterlab.data.formats import SourceRow
from adapterlab.errors import DataError, nearest
from adapterlab.json_text import parsed
from adapterlab.paths import user_path

Numbered = Iterator[tuple[int, Any]]


class _Written(float):
    """A number that remembers how it was written: 3.10 is not 3.1 where it is learnt as text."""

    def __new__(cls, written: str) -> _Written:
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str

    def __str__(self) -> str:
        return self.written

    def __reduce__(self) -> tuple[Any, ...]:
        return _Written, (self.written,)


class _Unusable(ValueError):
    """A name that stands twice in one object or header, so that a value would be lost; or half a character."""


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Unusable(f"the name {name!r} stands twice in one object, and only one value could be used")
        found[name] = value
    return found


def _parsed(text: str) -> Any:
    value = parsed(text, object_pairs_hook=_once, parse_float=_Written)
    if "\\ud" in text or "\\uD" in text:  # half of a pair of escapes is no character
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _Unusable(f"half a character ({error.object[error.start]!r}) stands in a text") from None
    return value


def _jsonl(path: Path) -> Numbered:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, _parsed(text)
            except ValueError as error:
                raise DataError(
                    f"Row {number} of {path} is not valid JSON: {error}. Received: {_shown(line)}. "
                    "Every line of a .jsonl file is one JSON object; mend or remove this line."
                ) from None


def _json(path: Path) -> Numbered:
    try:
        value = _parsed(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise DataError(
            f"{path} is not valid JSON: {error}. If it holds one object a line, name it {path.stem}.jsonl."
        ) from None
    if isinstance(value, dict):
        lists = {k: v for k, v in value.items() if isinstance(v, list)}
        if len(lists) != 1:
            raise DataError(
                f"{path} holds one object with {len(lists)} lists in it ({', '.join(lists) or 'no lists'}), "
                "not a list of rows. Write the rows as one list: [{...}, {...}]."
            )
        value = next(iter(lists.values()))
    if not isinstance(value, list):
        raise DataError(f"{path} holds a {type(value).__name__}, not a list of rows. Write [{{...}}, {{...}}].")
    yield from enumerate(value, 1)


def _csv(path: Path, delimiter: str = ",") -> Numbered:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB is less than a long document
    try:
        text = path.read_text("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        _once((name, None) for name in reader.fieldnames or ())
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                got = "more" if None in row else "fewer"
                raise DataError(
                    f"Row {number} of {path} has {got} values than the header has columns. "
                    "Quote values that hold the separator or line breaks."
                )
            yield number, row
    except (UnicodeDecodeError, csv.Error, _Unusable) as error:
        raise DataError(f"{path} cannot be read as UTF-8 separated values: {error}.") from None


def _tsv(path: Path) -> Numbered:
    return _csv(path, "\t")


def _parquet(path: Path) -> Numbered:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
    from pyarrow import ArrowException

    try:
        file = pq.ParquetFile(path)
        _once((name, None) for name in file.schema_arrow.names)
        yield from enumerate((_unfilled(row) for batch in file.iter_batches() for row in batch.to_pylist()), 1)
    except (ArrowException, OSError, _Unusable) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}. Write the file again.") from None


def _unfilled(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without the nulls within its values: tables give all objects in a column the same fields."""

    def less(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: less(v) for k, v in value.items() if v is not None}
        return [less(v) for v in value] if isinstance(value, list) else value

    return {name: less(value) for name, value in row.items()}


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def _shown(value: Any, length: int = 60) -> str:
    text = repr(value.decode("utf-8", "replace").rstrip() if isinstance(value, bytes) else value)
    return text if len(text) <= length else text[: length - 3] + "..."


def read_rows(
    path: str, *, split: str | None = None, name: str | None = None, limit: int | None = None
) -> list[SourceRow]:
    """Read raw rows from a file, a folder or the hub.

    Args:
        path: local file or folder, or hub id.
        split: split of a hub data set; for a folder, the beginning of the file names to read.
        name: configuration of a hub data set.
        limit: read no more rows than this.

    Returns:
        At least one row.

    Raises:
        DataError: nothing is there, a file is damaged, or there are no rows. The message names file and row.
    """
    place = user_path(path)
    if place.exists():
        if not place.is_file() and not place.is_dir():
            raise DataError(
                f"{path} is neither a file nor a folder, and rows are read more than once. Write them to a file first."
            )
        if name:
            raise DataError(f"data.name={name!r} is for hub data sets, but {path} is local. Remove data.name.")
        if place.is_file() and split not in (None, "train"):
            raise DataError(
                f"{path} is one file and has no split {split!r}. Put one file a split into a folder, "
                "or name the evaluation file with data.eval_path."
            )
        files = _files(place, split) if place.is_dir() else [place]
        rows = list(islice(_local(files), limit))
    elif _looks_local(path):
        raise DataError(f"There is no file or folder {path!r}. {_neighbours(place)}")
    else:
        rows = _hub(path, split or "train", name, limit)
    if not rows:
        raise DataError(f"{path} holds no rows. Give a file with at least one row.")
    return rows


def _looks_local(path: str) -> bool:
    return Path(path).suffix.lower() in READERS or not _HUB_ID.fullmatch(path)


def _neighbours(place: Path) -> str:
    folder = place.parent
    if not folder.is_dir():
        return f"The folder {str(folder)!r} does not exist either."
    found = [p.name for p in folder.iterdir() if p.is_dir() or p.suffix.lower() in READERS]
    return f"In {str(folder.resolve())!r}: {nearest(place.name, found)}"


def _files(folder: Path, split: str | None) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in READERS)
    if not files:
        raise DataError(f"The folder {folder} holds no data files. Readable: {', '.join(READERS)}.")
    of_split = [p for p in files if split and p.stem.startswith(split)]
    if split not in (None, "train") and not of_split:
        raise DataError(
            f"No file of {folder} begins with the split's name {split!r}. "
            f"{nearest(str(split), [p.stem for p in files])}"
        )
    return of_split or files


def _local(files: list[Path]) -> Iterator[SourceRow]:
    for file in files:
        reader = READERS.get(file.suffix.lower())
        if reader is None:
            raise DataError(
                f"{file} has the suffix {file.suffix!r}, which is no known data file. Readable: {', '.join(READERS)}."
            )
        for number, values in reader(file):
            if not isinstance(values, dict):
                raise DataError(
                    f"Row {number} of {file} is a {type(values).__name__}, not an object with named columns. "
                    f"Received: {_shown(values)}."
                )
            yield SourceRow(file.name, number, values)


def _hub(path: str, split: str, name: str | None, limit: int | None) -> list[SourceRow]:
    import datasets

    try:
        loaded = datasets.load_dataset(path, name, split=split)
    # The hub client raises errors of many libraries (HTTP, hub, file system, arrow); all mean the same to the user.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        part = f"split {split!r}" + (f", configuration {name!r}" if name else "")
        raise DataError(
            f"The data set {path!r} ({part}) could not be loaded: {reason}. "
            f"{path!r} is no local file either. {_neighbours(Path(path))} "
            "Without a connection, download the rows elsewhere and set data.path to the local file or folder "
            f"({', '.join(READERS)})."
        ) from error
    return [SourceRow(path, number, _unfilled(dict(row))) for number, row in enumerate(islice(loaded, limit), 1)]
