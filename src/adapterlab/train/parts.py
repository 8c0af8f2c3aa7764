"""What of a checkpoint is split among processes: each writes its rows into a file of its own, and nobody holds a whole.

Beside `state.pt`, which names the files with their checksums and says which rows are where, stands a folder for each
checkpoint with a safetensors file for each process. `state.pt` is written last and names a folder of its own step, so
it never speaks of files that are not complete. Read by any number of processes: each takes the rows that it needs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapterlab.errors import FormatError, OutputError
from adapterlab.foreign.sharding import laid_out_rows, local, rows_here
from adapterlab.io.disk import explained, sync
from adapterlab.io.links import check_links

PARTS = "parts"  # key in a checkpoint
_LEAD = "parts-"
Way = tuple[Any, ...]  # keys that lead to a tensor in a state


@dataclass(frozen=True)
class Written:
    """What one process wrote.

    Attributes:
        file: its path from the folder of the checkpoint.
        sha256: of the file.
        rows: for each tensor the first row in the file, and the one behind the last.
    """

    file: str
    sha256: str
    rows: list[tuple[int, int]]


def write(folder: Path, step: int, rank: int, parts: Mapping[Way, Tensor]) -> Written:
    """Write this process's rows of tensors.

    Args:
        folder: of the checkpoint.
        step: of the run.
        rank: of this process.
        parts: in the order that every process has.

    Raises:
        OutputError: the disk is full or the file cannot be written.
    """
    name = f"{_LEAD}{step}/{rank}.safetensors"
    file, work = folder / name, folder / f"{name}.part"
    with explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({str(i): local(tensor).cpu().contiguous() for i, tensor in enumerate(parts.values())}, work)
        digest = _sha256(work)
        sync(work)
        os.replace(work, file)
        sync(file.parent)
    return Written(name, digest, [rows_here(tensor) for tensor in parts.values()])


def listed(folder: Path, parts: Mapping[Way, Tensor], written: list[Written]) -> dict[str, Any]:
    """Return what the checkpoint says about its parts, once every process has written.

    Raises:
        OutputError: a file of another process is not seen from here.
    """
    lacking = [each.file for each in written if not (folder / each.file).is_file()]
    if lacking:
        raise OutputError(
            f"{folder / lacking[0]} was written by another process and is not there for this one. Processes on several "
            "machines that split a model need an output folder that all of them share."
        )
    return {
        "files": {each.file: each.sha256 for each in written},
        "tensors": [
            {
                "way": way, "shape": tuple(tensor.shape), "dtype": tensor.dtype,
                "rows": {each.file: each.rows[i] for each in written if each.rows[i][0] < each.rows[i][1]},
            }
            for i, (way, tensor) in enumerate(parts.items())
        ],
    }  # fmt: skip


def tidy(folder: Path, keep: int | None) -> None:
    """Remove the parts of other checkpoints than that of a step."""
    for old in folder.glob(f"{_LEAD}*"):
        if keep is None or old.name != f"{_LEAD}{keep}":
            shutil.rmtree(old, ignore_errors=True)


def filled(folder: Path, state: Mapping[str, Any], like: Callable[[Way], Tensor]) -> dict[str, Any]:
    """Return a state with its parts in their places, read from their files.

    Args:
        folder: of the checkpoint.
        state: as it was read.
        like: the tensor as the run has it now, whose rows on this process are read.

    Raises:
        FormatError: a file is missing or damaged, or does not hold what the checkpoint says.
    """
    listing = state.get(PARTS)
    if not listing:
        return dict(state)
    found = _opened({key: value for key, value in state.items() if key != PARTS})
    check_links(folder, *listing["files"])
    try:
        for file, digest in listing["files"].items():
            if _sha256(folder / file) != digest:
                raise ValueError(f"{file} is damaged: its checksum differs")
        for i, entry in enumerate(listing["tensors"]):
            way, tensor = entry["way"], like(entry["way"])
            if tuple(tensor.shape) != tuple(entry["shape"]):
                raise ValueError(f"{way[-1]} has the shape {entry['shape']} there and {tuple(tensor.shape)} here")
            _put(found, way, laid_out_rows(_rows(folder, str(i), entry, rows_here(tensor)), tensor))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FormatError(
            f"The parts of the checkpoint in {folder} cannot be read ({error}). Start again with --overwrite."
        ) from None
    return found


def _rows(folder: Path, key: str, entry: Mapping[str, Any], wanted: tuple[int, int]) -> Tensor:
    """Some rows of a tensor, from the files that have them."""
    start, stop = wanted
    made = torch.empty((stop - start, *entry["shape"][1:]), dtype=entry["dtype"])
    left = stop - start
    for file, (first, last) in entry["rows"].items():
        low, high = max(start, first), min(stop, last)
        if low < high:
            with safe_open(folder / file, "pt") as opened:
                made[low - start : high - start] = opened.get_slice(key)[low - first : high - first]
            left -= high - low
    if left:
        raise ValueError(f"{left} rows of {entry['way'][-1]} are in none of its files")
    return made


def _opened(tree: Any) -> Any:
    """A copy of nested mappings, into which may be written."""
    return {key: _opened(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _put(tree: Any, way: Way, value: Tensor) -> None:
    for key in way[:-1]:
        tree = tree[key]
    tree[way[-1]] = value


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
