"""Where raw rows come from: local files, folders and patterns of them, and the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

from adapterlab.data.formats import SourceRow
from adapterlab.data.origin import Files, check_loaded
from adapterlab.data.readers import READERS, TYPED, rows_in, unfilled
from adapterlab.data.views import Joined
from adapterlab.errors import DataError, nearest
from adapterlab.paths import user_path

HELD = 16 << 20  # bytes of files that are read into memory; larger ones stay on the disk
FEW = 10_000  # rows that are looked at, and encoded, before anything else happens
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_PATTERN = re.compile(r"[*?\[]")
_SAVED = "dataset_info.json"  # in what `save_to_disk` of `datasets` wrote; a dictionary of splits has the other
_SAVED_SPLITS = "dataset_dict.json"


def read_rows(
    path: str,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> Sequence[SourceRow]:
    """Read raw rows from files, a folder or the hub.

    Args:
        path: local file or folder, pattern of files such as `rows/*.jsonl`, or hub id.
        split: split of a hub data set; for a folder, the beginning of the file names to read.
        name: configuration of a hub data set.
        revision: its branch, tag or commit; None: the default branch.
        limit: read no more rows than this.

    Returns:
        At least one row. What is too large to hold stays on the disk, and is read when a row is asked for.

    Raises:
        DataError: nothing is there, a file is damaged, or there are no rows. The message names file and row.
        OutputError: what is too large to hold cannot be kept.
    """
    place = _local_place(path, split, name, revision)
    if place is None:
        rows = _hub(path, split or "train", name, revision, limit)
    elif _is_saved(place):
        from adapterlab.data import tables

        rows = _held(tables.from_disk(place, split).first(limit))
    else:
        rows = _local(files_of(path, place, split), limit)
    if not rows:
        raise DataError(f"{path} holds no rows. Give a file with at least one row.")
    return rows


def is_on_hub(path: str) -> bool:
    """Say whether a path means a data set of the hub.

    Raises:
        DataError: it means a file that is not there.
    """
    return _local_place(path, None, None, None) is None


def files_behind(path: str, split: str | None) -> Files:
    """Return what tells whether the files of a local path stay what they are; there are none of a hub data set.

    Raises:
        DataError: nothing is there.
    """
    place = _local_place(path, split, None, None)

    def listed() -> list[Path]:
        if place is None or not (place.exists() or _PATTERN.search(path)):
            return []
        return sorted(p for p in place.rglob("*") if p.is_file()) if _is_saved(place) else files_of(path, place, split)

    return Files(listed)


def stream_rows(
    path: str,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    skip: int = 0,
) -> Iterator[SourceRow]:
    """Yield raw rows one after the other, without keeping any.

    Args:
        path: as for `read_rows`.
        split: as for `read_rows`.
        name: as for `read_rows`.
        revision: as for `read_rows`.
        limit: end after this many rows of the source.
        skip: rows at the beginning to leave out.

    Raises:
        DataError: as for `read_rows`.
    """
    place = _local_place(path, split, name, revision)
    if place is not None and not _is_saved(place):
        yield from islice(_read(files_of(path, place, split)), skip, _end(skip, limit))
        return
    if place is not None:
        from adapterlab.data import tables

        yield from islice(iter(tables.from_disk(place, split)), skip, _end(skip, limit))
        return
    found = _loaded(path, split or "train", name, revision, streaming=True)
    most = None if limit is None else max(0, limit - skip)
    for number, row in enumerate(islice(found.skip(skip) if skip else found, most), skip + 1):
        yield SourceRow(path, number, unfilled(dict(row)))


def _end(skip: int, limit: int | None) -> int | None:
    return None if limit is None else max(skip, limit)


def _local_place(path: str, split: str | None, name: str | None, revision: str | None) -> Path | None:
    """The file or folder that a path names; None for what is on the hub."""
    place = user_path(path)
    if not place.exists():
        if _PATTERN.search(path) or not _looks_local(path):
            return place if _PATTERN.search(path) else None
        raise DataError(f"There is no file or folder {path!r}. {_neighbours(place)}")
    if not place.is_file() and not place.is_dir():
        raise DataError(
            f"{path} is neither a file nor a folder, and rows are read more than once. Write them to a file first."
        )
    for key, value in {"name": name, "revision": revision}.items():
        if value:
            raise DataError(f"data.{key}={value!r} is for hub data sets, but {path} is local. Remove data.{key}.")
    if place.is_file() and split not in (None, "train"):
        raise DataError(
            f"{path} is one file and has no split {split!r}. Put one file a split into a folder, "
            "or name the evaluation file with data.eval_path."
        )
    return place


def _is_saved(place: Path) -> bool:
    return any((place / name).is_file() for name in (_SAVED, _SAVED_SPLITS))


def files_of(path: str, place: Path, split: str | None) -> list[Path]:
    """Return the files that a local path means, in their order.

    Raises:
        DataError: there are none, or none of the split.
    """
    if place.is_file():
        return [place]
    if place.is_dir():
        return _files(place, split)
    found = sorted(Path(file) for file in glob(str(place), recursive=True) if Path(file).is_file())
    if not found:
        raise DataError(f"No file fits the pattern {path!r}. {_neighbours(Path(_PATTERN.split(str(place))[0] + '-'))}")
    return found


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


def _read(files: Sequence[Path]) -> Iterator[SourceRow]:
    return (SourceRow(file.name, number, values) for file in files for number, values in rows_in(file))


def _local(files: list[Path], limit: int | None) -> Sequence[SourceRow]:
    known = [file for file in files if file.suffix.lower() in READERS]
    if len(known) < len(files) or sum(f.stat().st_size for f in files) <= HELD or (limit or FEW + 1) <= FEW:
        return [*islice(_read(files), limit)]
    from adapterlab.data import tables

    by_kind: dict[str, list[Path]] = {}
    for file in files:
        kind = file.suffix.lower()
        by_kind.setdefault(kind if kind in TYPED else "", []).append(file)
    parts = [
        tables.typed(some, f"{some[0].name}{', ...' if some[1:] else ''}") if kind else tables.kept(some)
        for kind, some in by_kind.items()
    ]
    if len(parts) == 1:
        return _held(parts[0].first(limit))
    rows = Joined(parts)
    return rows if limit is None else rows[:limit]


def _held(table: Any) -> Sequence[SourceRow]:
    """A table as it is, or its rows where they are few."""
    return [*table] if len(table) <= FEW else table


def _hub(path: str, split: str, name: str | None, revision: str | None, limit: int | None) -> Sequence[SourceRow]:
    from adapterlab.data import tables

    found = _loaded(path, split, name, revision)
    check_loaded(path, found.cache_files, revision)
    return _held(tables.Table(found, path).first(limit))


def _loaded(path: str, split: str, name: str | None, revision: str | None, **options: Any) -> Any:
    import datasets

    try:
        pinned = {"revision": revision} if revision else {}
        return datasets.load_dataset(path, name, split=split, **pinned, **options)
    # The hub client raises errors of many libraries (HTTP, hub, file system, arrow); all mean the same to the user.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        part = f"split {split!r}" + "".join(
            f", {word} {value!r}" for word, value in (("configuration", name), ("revision", revision)) if value
        )
        raise DataError(
            f"The data set {path!r} ({part}) could not be loaded: {reason}. "
            f"{path!r} is no local file either. {_neighbours(Path(path))} "
            "Without a connection, download the rows elsewhere and set data.path to the local file or folder "
            f"({', '.join(READERS)})."
        ) from error
