"""Files of rows: from a kind of file to its rows, exactly as they are written, one after the other."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from json import JSONDecoder
from pathlib import Path
from typing import Any

from adapterlab.errors import DataError
from adapterlab.json_text import parsed

Numbered = Iterator[tuple[int, Any]]
Texts = Iterator[tuple[int, str]]


class _Written(float):
    """A number that remembers how it was written: 3.10 is not 3.1 where it is learnt as text."""

    def __new__(cls, written: str) -> _Written:
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str

    def __str__(self) -> str:
        return self.written

    __repr__ = __str__

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


def row_of(text: str, number: int, file: str | Path) -> dict[str, Any]:
    """Read a row that is kept as JSON.

    Args:
        text: the row.
        number: of the row in its file.
        file: for the message.

    Raises:
        DataError: it is no JSON, or no object.
    """
    try:
        return checked(_parsed(text), number, file)
    except ValueError as error:
        raise _not_json(number, file, error, text) from None


def checked(values: Any, number: int, file: str | Path) -> dict[str, Any]:
    """Return a row, if it is one.

    Raises:
        DataError: it has no named columns.
    """
    if isinstance(values, dict):
        return values
    raise DataError(
        f"Row {number} of {file} is a {type(values).__name__}, not an object with named columns. "
        f"Received: {_shown(values)}."
    )


def _not_json(number: int, file: str | Path, error: Exception, line: str | bytes) -> DataError:
    return DataError(
        f"Row {number} of {file} is not valid JSON: {error}. Received: {_shown(line)}. "
        "Every line of a .jsonl file is one JSON object; mend or remove this line."
    )


def _shown(value: Any, length: int = 60) -> str:
    text = repr(value.decode("utf-8", "replace").rstrip() if isinstance(value, bytes) else value)
    return text if len(text) <= length else text[: length - 3] + "..."


def _lines(path: Path) -> Texts:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except ValueError as error:
                raise _not_json(number, path, error, line) from None
            if text:
                yield number, text


def _jsonl(path: Path) -> Numbered:
    for number, text in _lines(path):
        yield number, row_of(text, number, path)


def _json(path: Path) -> Numbered:
    try:
        value = _parsed(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise _no_list(path, error) from None
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


def _no_list(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not valid JSON: {error}. If it holds one object a line, name it {path.stem}.jsonl.")


_SPACE = re.compile(r"\s*")


def _elements(path: Path) -> Texts:
    """The rows of a list as they are written, one at a time: as objects all of them take ten times the room."""
    text = path.read_text("utf-8-sig")

    def after(place: int) -> tuple[int, str]:
        """What stands after white space."""
        place = _SPACE.match(text, place).end()  # type: ignore[union-attr]
        return place, text[place : place + 1]

    place, sign = after(0)
    if sign != "[":
        raise DataError(
            f"{path} is too large to hold and begins with {sign!r}, not with a list of rows. Write one object a line "
            "into a .jsonl file."
        )
    number, sign = 0, ","
    if after(place + 1)[1] == "]":
        return
    while sign == ",":
        number += 1
        try:
            start = after(place + 1)[0]
            end = JSONDecoder().raw_decode(text, start)[1]
        except (ValueError, RecursionError) as error:
            raise _no_list(path, error) from None
        yield number, text[start:end]
        place, sign = after(end)
    if sign != "]":
        raise _no_list(path, ValueError(f"after row {number} stands {sign!r}, not a comma or the end of the list"))


def _csv(path: Path, delimiter: str = ",") -> Numbered:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB is less than a long document
    try:
        with path.open(encoding="utf-8-sig") as text:
            reader = csv.DictReader(text, delimiter=delimiter, strict=True)
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
        yield from enumerate((unfilled(row) for batch in file.iter_batches() for row in batch.to_pylist()), 1)
    except (ArrowException, OSError, _Unusable) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}. Write the file again.") from None


def _arrow(path: Path) -> Numbered:
    from pyarrow import ArrowException, ipc, memory_map

    try:
        with memory_map(str(path)) as file:
            try:
                batches = ipc.open_stream(file)
            except ArrowException:
                file.seek(0)
                found = ipc.open_file(file)
                batches = (found.get_batch(i) for i in range(found.num_record_batches))
            yield from enumerate((unfilled(row) for batch in batches for row in batch.to_pylist()), 1)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Arrow: {error}. Write the file again.") from None


def unfilled(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a table without nulls within its values: tables give all objects in a column the same fields."""

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
    ".arrow": _arrow,
}
TYPED = (".parquet", ".arrow")  # files that say of what type a value is


def texts(file: Path) -> Texts:
    """Yield the rows of a file that says no types as JSON, in bounded memory (but for the text of one `.json` list).

    Raises:
        DataError: the file is damaged; what a row says is looked at by `row_of`.
    """
    kind = file.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        yield from _lines(file)
    elif kind == ".json":
        yield from _elements(file)
    else:
        for number, row in READERS[kind](file):
            yield number, json.dumps(row, ensure_ascii=False)


def rows_in(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a file with their numbers.

    Raises:
        DataError: the kind of the file is not known, or it is damaged.
    """
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(
            f"{file} has the suffix {file.suffix!r}, which is no known data file. Readable: {', '.join(READERS)}."
        )
    for number, values in reader(file):
        yield number, checked(values, number, file)
