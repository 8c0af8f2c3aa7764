"""Token rows on the disk: files of a few thousand rows each, written whole, checked and mapped into memory."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from adapterlab.data.encoding import IGNORED
from adapterlab.data.formats import Columns
from adapterlab.data.report import Encoded, Report
from adapterlab.errors import OutputError
from adapterlab.evaluate.pruning import limit, prune, use
from adapterlab.io.atomic import new_file
from adapterlab.terminal import Terminal

SIZE = 2048  # rows of a source in a file
_OPEN = 64  # files that are mapped at once
_SEAL = 64  # digits of the checksum in front
_OURS = ("input_ids", "labels", "cut")


class Shard:
    """The token rows that one file holds, one for each row of the source; those that were dropped are empty.

    Attributes:
        table: the columns, mapped or in memory.
    """

    def __init__(self, table: pa.Table):
        self.table = table
        self._columns = {name: table.column(name).chunk(0) for name in table.column_names if name != "cut"}

    @property
    def facts(self) -> dict[str, Any]:
        """What the report says that is no count."""
        return dict(json.loads(self.table.schema.metadata[b"facts"]))

    def row(self, index: int) -> dict[str, Any]:
        """Return a row as `encode` makes it."""
        row = {name: column[index].as_py() for name, column in self._columns.items()}
        if len(row) > 2:
            import torch

            row |= {name: torch.tensor(value) for name, value in row.items() if name not in _OURS}
        return row

    @property
    def columns(self) -> Columns:
        """Which columns of the source were read."""
        return Columns(*map(tuple, self.facts["columns"]))

    def lengths(self) -> np.ndarray:
        """Return the tokens of each row."""
        return np.diff(self._columns["input_ids"].offsets.to_numpy())

    def report(self, chosen: np.ndarray, limit: int) -> Report:
        """Report on some of the rows.

        Args:
            chosen: which, one value a row.
            limit: the most tokens that a row may have.
        """
        lengths, facts = self.lengths(), self.facts
        cut = self.table.column("cut").to_numpy()
        kept = chosen & (lengths > 0)
        tokens, rows = int(lengths[kept].sum()), int(kept.sum())
        trained = self._counted("labels", lambda values: values != IGNORED)[kept].sum()
        unknown = self._counted("input_ids", lambda values: values == facts["unknown"])[kept].sum()
        return Report(
            rows=rows, dropped=int(chosen.sum()) - rows, truncated=int(cut[kept].sum()), tokens=tokens,
            trained_tokens=int(trained), trained_share=int(trained) / max(1, tokens),
            max_length=int(lengths[kept].max(initial=0)), mean_length=tokens / max(1, rows), limit=limit,
            mask_by=facts["mask_by"], template=facts["template"], unshown=tuple(facts["unshown"]), unknown=int(unknown),
        )  # fmt: skip

    def _counted(self, name: str, test: Any) -> np.ndarray:
        """How many values of each row pass a test."""
        column = self._columns[name]
        offsets = column.offsets.to_numpy()
        sums = np.concatenate([[0], np.cumsum(test(column.values.to_numpy(zero_copy_only=False)))])
        return np.asarray(sums[offsets[1:]] - sums[offsets[:-1]])


def shard_of(encoded: Encoded, count: int, further: Sequence[str], columns: Columns, unknown: int) -> Shard:
    """Return what a file holds of encoded rows.

    Args:
        encoded: the rows of the source that were not dropped.
        count: rows of the source.
        further: columns of each token row beside ids and labels.
        columns: those of the source that were read.
        unknown: the id of the token for what the tokenizer has no word for.
    """
    rows: list[Mapping[str, Any]] = [{}] * count
    for place, row in zip(encoded.kept, encoded.rows, strict=True):
        rows[place] = row
    ids = {name: pa.array([row.get(name, []) for row in rows], pa.list_(pa.int32())) for name in _OURS[:2]}
    more = {name: pa.array([int(row.get(name, 0)) for row in rows], pa.int64()) for name in further}
    cut = np.zeros(count, bool)
    cut[[*encoded.cut]] = True
    report = encoded.report
    facts = {
        "mask_by": report.mask_by, "template": report.template, "unshown": report.unshown, "unknown": unknown,
        "columns": [columns.used, columns.unused],
    }  # fmt: skip
    table = pa.table({**ids, **more, "cut": cut})
    return Shard(table.replace_schema_metadata({"facts": json.dumps(facts)}))


class Shards:
    """The files of one source in a folder.

    Attributes:
        folder: where they are.
        full: whether it took no more of them; what is made from then on stays in memory.
    """

    def __init__(self, folder: Path):
        self.folder, self.full = folder, False
        self._mapped: OrderedDict[int, Shard] = OrderedDict()
        self._checked: set[int] = set()
        self._memory: dict[int, Shard] = {}
        self._use: Any = None  # while it is open nobody removes the folder

    def has(self, number: int) -> bool:
        """Say whether a file was written, without reading it."""
        return number in self._memory or self._file(number).is_file()

    def get(self, number: int) -> Shard | None:
        """Return a file's rows; None where there is none, or it is damaged, which is said."""
        if (found := self._mapped.get(number) or self._memory.get(number)) is not None:
            return found
        if (found := self._read(number)) is None:
            return None
        self._mapped[number] = found
        if len(self._mapped) > _OPEN:
            self._mapped.popitem(last=False)
        return found

    def put(self, number: int, shard: Shard) -> None:
        """Keep rows: on the disk, or in memory where the disk does not take them, which is said."""
        if not self.full:
            try:
                self._write(self._file(number), shard)
            except OutputError as error:
                _say(f"Encoded rows are not kept for other runs. {error}")
                self.full = True
            else:
                self._checked.add(number)
                return
        self._memory[number] = shard

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.rows"

    def _hold(self) -> None:
        """Keep the folder, and make room for a new one."""
        if self._use is None:
            self._use = use(self.folder)
            if not self.folder.exists():
                prune(self.folder.parent, limit())

    def _write(self, file: Path, shard: Shard) -> None:
        self._hold()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, shard.table.schema) as stream:
            stream.write_table(shard.table)
        data = sink.getvalue()
        with new_file(file) as target:
            target.write(_seal(data))
            target.write(data)

    def _read(self, number: int) -> Shard | None:
        file = self._file(number)
        if not file.exists():
            return None
        self._hold()
        try:
            with pa.memory_map(str(file)) as mapped:
                whole = mapped.read_buffer()
            data = whole.slice(_SEAL)
            if number not in self._checked and whole[:_SEAL].to_pybytes() != _seal(data):
                raise pa.ArrowInvalid("its checksum is another one")
            found = Shard(pa.ipc.open_stream(data).read_all().combine_chunks())
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException, ValueError, KeyError, IndexError) as error:
            _say(f"{file} is damaged ({error}) and is made anew.")
            file.unlink(missing_ok=True)
            return None
        self._checked.add(number)
        return found


def _say(text: str) -> None:
    Terminal(stderr=True, highlight=False, soft_wrap=True).print(text)


def _seal(data: pa.Buffer) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
