"""`load_data`: training and evaluation examples from a `DataConfig`, the same for the same settings."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterlab.data.config import TASK_ROWS, DataConfig
from adapterlab.data.formats import Columns, Example, Numbers, examples_from
from adapterlab.data.sources import read_rows
from adapterlab.data.tasks import generate
from adapterlab.errors import DataError

_EVAL_MOST, _EVAL_SHARE = 200, 10  # default evaluation size: one row of ten, at most 200


@dataclass(frozen=True)
class Splits:
    """Examples to train and to evaluate on.

    Attributes:
        train: training examples.
        eval: evaluation examples; may be empty.
        format: name of the row format ("task" for generated rows).
        source: where the training rows come from.
        eval_source: where the evaluation rows come from.
        overlap: evaluation rows whose prompt is also in train.
        replaced: generated training rows that were replaced to keep the two apart.
        columns: which columns of the rows became examples.
    """

    train: list[Example]
    eval: list[Example]
    format: str
    source: str
    eval_source: str
    overlap: int = 0
    replaced: int = 0
    columns: Columns = field(default_factory=Columns)


def load_data(cfg: DataConfig, numbers: Numbers | None = None) -> Splits:
    """Load or generate the rows that a configuration names.

    Args:
        cfg: the data settings.
        numbers: columns of the training rows that a method reads beside the text, and the numbers that may be there.

    Returns:
        Training and evaluation examples in a fixed order.

    Raises:
        DataError: rows are missing, damaged or cannot be understood.
        ConfigError: a task or its arguments are unknown.
    """
    if cfg.task is not None:
        if numbers:
            raise DataError(
                f"The method reads the column {', '.join(numbers)} of each row, and generated rows have none. Write "
                "the rows to a file with that column, and name it in data.path."
            )
        return _generated(cfg)
    raw = read_rows(str(cfg.path), split=cfg.split, name=cfg.name, limit=cfg.limit)
    rows, name, columns = examples_from(raw, cfg, numbers)
    if cfg.eval_path or cfg.eval_split:
        held, _, more = _eval_rows(cfg)
        train, source, columns = rows, _eval_source(cfg), columns.joined(more)
    else:
        count = _eval_count(cfg, len(rows))
        if count >= len(rows):
            raise DataError(
                f"data.eval_size={cfg.eval_size} leaves none of the {len(rows)} rows of {cfg.path} to train on. "
                "Lower it."
            )
        chosen = set(random.Random(cfg.seed).sample(range(len(rows)), count))
        train = [e for i, e in enumerate(rows) if i not in chosen]
        held, source = [rows[i] for i in sorted(chosen)], f"{count} rows held out of {cfg.path}"
    held = held[: cfg.eval_limit]
    seen = {e.prompt for e in train}
    overlap = sum(e.prompt in seen for e in held)
    return Splits(train, held, name, str(cfg.path), source, overlap, columns=columns)


def _eval_count(cfg: DataConfig, rows: int) -> int:
    if cfg.eval_size is None:
        return min(_EVAL_MOST, rows // _EVAL_SHARE)
    return cfg.eval_size if isinstance(cfg.eval_size, int) else round(cfg.eval_size * rows)


def _eval_source(cfg: DataConfig) -> str:
    return " ".join(filter(None, [cfg.eval_path or cfg.path, cfg.eval_split]))


def _eval_rows(cfg: DataConfig) -> tuple[list[Example], str, Columns]:
    path = str(cfg.eval_path or cfg.path)
    raw = read_rows(path, split=cfg.eval_split, name=None if cfg.eval_path else cfg.name, limit=cfg.eval_limit)
    return examples_from(raw, cfg)


def _generated(cfg: DataConfig) -> Splits:
    rows = cfg.limit or TASK_ROWS
    count = _eval_count(cfg, rows)
    wanted = min(count, cfg.eval_limit or count)
    train, held, replaced = generate(cfg, rows, wanted)
    source = f"reasoning-gym {cfg.task}"
    return Splits(train, held, "task", source, source, overlap=0, replaced=replaced)


def fingerprint(examples: Sequence[Example]) -> str:
    """Hash the content of examples in their order, to tell whether a resumed run sees the same data.

    Row numbers do not count, so blank lines in a file change nothing.

    Args:
        examples: the examples.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    digest = hashlib.sha256()
    for example in examples:
        content: list[Any] = [example.messages, example.text, example.answer, example.meta]
        content += [part for part in (example.context, example.trained, example.numbers) if part]
        digest.update(json.dumps(content, sort_keys=True, default=_plain).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    # Sets come in another order in every process.
    return sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else repr(value)
