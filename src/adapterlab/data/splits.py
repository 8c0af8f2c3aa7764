"""`load_data`: training and evaluation examples from a `DataConfig`, the same for the same settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adapterlab.data.config import TASK_ROWS, DataConfig, Mixing
from adapterlab.data.formats import Columns, Example, Examples, Numbers, SourceRow, layout_of
from adapterlab.data.mixture import Mixture, Named
from adapterlab.data.origin import Commits
from adapterlab.data.sources import FEW, is_on_hub, read_rows
from adapterlab.data.streams import Stream, Streams
from adapterlab.data.tasks import generate
from adapterlab.data.views import Joined, Others, Picked
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
        replaced: generated training rows that were replaced to keep the two apart.
        columns: which columns of the rows became examples; of many rows those that were looked at.
        commits: of each hub data set that was read, by what was asked for.
        files: what says whether the local files of streams are the same later; rows that are no stream are known by
            what they say.
    """

    train: Sequence[Example]
    eval: Sequence[Example]
    format: str
    source: str
    eval_source: str
    replaced: int = 0
    columns: Columns = field(default_factory=Columns)
    commits: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def overlap(self) -> int:
        """Evaluation rows whose prompt is also in train."""
        asked = {example.prompt for example in self.eval}
        found = {prompt for example in self.train if (prompt := example.prompt) in asked}
        return sum(example.prompt in found for example in self.eval)


def load_data(cfg: DataConfig, numbers: Numbers | None = None, commits: Mapping[str, str] | None = None) -> Splits:
    """Load or generate the rows that a configuration names.

    Up to `FEW` rows are read and checked at once. Of more, each becomes an example when somebody asks for it, and what
    is wrong with it is said then.

    Args:
        cfg: the data settings.
        numbers: columns of the training rows that a method reads beside the text, and the numbers that may be there.
        commits: the commits of hub data sets that are read again, as `Splits.commits` named them.

    Returns:
        Training and evaluation examples in a fixed order.

    Raises:
        DataError: rows are missing, damaged or cannot be understood.
        ConfigError: a task or its arguments are unknown.
        OutputError: rows that are too many to hold cannot be kept.
    """
    if cfg.task is not None:
        if numbers:
            raise DataError(
                f"The method reads the column {', '.join(numbers)} of each row, and generated rows have none. Write "
                "the rows to a file with that column, and name it in data.path."
            )
        return _generated(cfg)
    asked = Commits(commits)
    found = _read(cfg, numbers, asked)
    return dataclasses.replace(found, commits=asked.found)


def _read(cfg: DataConfig, numbers: Numbers | None, commits: Commits) -> Splits:
    """The rows of one source, or of several."""
    if cfg.sources is not None:
        return _mixed(cfg, numbers, commits)
    if cfg.streaming:
        return _streamed(cfg, numbers, commits)
    revision = _revision(str(cfg.path), cfg.name, cfg.revision, commits)
    raw = read_rows(str(cfg.path), split=cfg.split, name=cfg.name, revision=revision, limit=cfg.limit)
    rows, name, columns = _examples(raw, cfg, numbers)
    train: Sequence[Example] = rows
    if cfg.eval_path or cfg.eval_split:
        held, _, more = _eval_rows(cfg, commits)
        source, columns = _eval_source(cfg), columns.joined(more)
    else:
        chosen = held_out(cfg, len(rows))
        train = Picked(rows, Others(len(rows), chosen)) if len(rows) > FEW else _without(rows, chosen)
        held, source = [rows[i] for i in chosen], f"{len(chosen)} rows held out of {cfg.path}"
    return Splits(train, held[: cfg.eval_limit], name, str(cfg.path), source, columns=columns)


def _revision(path: str, name: str | None, revision: str | None, commits: Commits) -> str | None:
    """What to read of a hub data set: the commit where that is known, else what was asked for."""
    return (commits.of(path, name, revision) if is_on_hub(path) else None) or revision


def _mixed(cfg: DataConfig, numbers: Numbers | None, commits: Commits) -> Splits:
    """Several sources, each read as its own settings say."""
    parts = [_read(part, numbers, commits) for part in cfg.parts()]
    weights = [given["weight"] for given in cfg.sources or () if given.get("weight")]
    mixing: Mixing = cfg.mixing or ("first_exhausted" if weights else "joined")
    columns = parts[0].columns
    for part in parts[1:]:
        columns = columns.joined(part.columns)
    rows = [part.train for part in parts]
    streams = [part for part in rows if isinstance(part, Stream)]
    return Splits(
        Streams(streams, weights or [1] * len(parts), cfg.seed)
        if streams
        else Mixture(rows, mixing, weights, cfg.seed),
        Named([part.eval for part in parts], _names([part.source for part in parts])),
        ", ".join(dict.fromkeys(part.format for part in parts)),
        f"{' + '.join(part.source for part in parts)} ({mixing})",
        " + ".join(part.eval_source for part in parts),
        columns=columns,
        files={file: facts for part in parts for file, facts in part.files.items()},
    )


def _names(sources: Sequence[str]) -> list[str]:
    """Short names of sources: the ends of their paths, or the whole paths where those are the same."""
    short = [Path(source).stem for source in sources]
    names = short if len({*short}) == len(short) else list(sources)
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def _streamed(cfg: DataConfig, numbers: Numbers | None, commits: Commits) -> Splits:
    """A source that is read while a run goes on; its first rows are held out, if there are no others."""
    own = bool(cfg.eval_path or cfg.eval_split)
    count = 0 if own else _EVAL_MOST if cfg.eval_size is None else int(cfg.eval_size)
    train = Stream(cfg, numbers, count, _revision(str(cfg.path), cfg.name, cfg.revision, commits))
    columns = train.columns
    if own:
        held, _, more = _eval_rows(cfg, commits)
        source, columns = _eval_source(cfg), columns.joined(more)
    else:
        held, source = train.head(count), f"the first {count} rows of {cfg.path}"
    return Splits(
        train, held[: cfg.eval_limit], train.layout.name, str(cfg.path), source, columns=columns,
        files=train.files.facts,
    )  # fmt: skip


def _examples(
    raw: Sequence[SourceRow], cfg: DataConfig, numbers: Numbers | None = None
) -> tuple[Sequence[Example], str, Columns]:
    """The examples, the format's name, and which columns were read."""
    layout = layout_of(raw, cfg, numbers)
    if len(raw) > FEW:
        rows = Examples(raw, layout)
        return rows, layout.name, rows.columns
    found, columns = layout.read(raw)
    return found, layout.name, columns


def held_out(cfg: DataConfig, rows: int) -> list[int]:
    """Choose the rows that are held out for evaluation, in their order.

    Raises:
        DataError: none is left to train on.
    """
    count = _eval_count(cfg, rows)
    if count >= rows:
        raise DataError(
            f"data.eval_size={cfg.eval_size} leaves none of the {rows} rows of {cfg.path} to train on. Lower it."
        )
    return sorted(random.Random(cfg.seed).sample(range(rows), count))


def _without(rows: Sequence[Example], chosen: Sequence[int]) -> list[Example]:
    held = set(chosen)
    return [example for i, example in enumerate(rows) if i not in held]


def _eval_count(cfg: DataConfig, rows: int) -> int:
    if cfg.eval_size is None:
        return min(_EVAL_MOST, rows // _EVAL_SHARE)
    return cfg.eval_size if isinstance(cfg.eval_size, int) else round(cfg.eval_size * rows)


def _eval_source(cfg: DataConfig) -> str:
    return " ".join(filter(None, [cfg.eval_path or cfg.path, cfg.eval_split]))


def _eval_rows(cfg: DataConfig, commits: Commits) -> tuple[Sequence[Example], str, Columns]:
    own = cfg.eval_path is not None
    path, name = str(cfg.eval_path or cfg.path), None if own else cfg.name
    revision = _revision(path, name, None if own else cfg.revision, commits)
    raw = read_rows(path, split=cfg.eval_split, name=name, revision=revision, limit=cfg.eval_limit)
    return _examples(raw, cfg)


def _generated(cfg: DataConfig) -> Splits:
    rows = cfg.limit or TASK_ROWS
    count = _eval_count(cfg, rows)
    wanted = min(count, cfg.eval_limit or count)
    train, held, replaced = generate(cfg, rows, wanted)
    source = f"reasoning-gym {cfg.task}"
    return Splits(train, held, "task", source, source, replaced=replaced)


def fingerprint(examples: Sequence[Example]) -> str:
    """Hash the content of examples in their order, to tell whether a resumed run sees the same data.

    Row numbers do not count, so blank lines in a file change nothing. Of many rows the source is hashed, and not the
    examples, whose settings are compared beside.

    Args:
        examples: the examples.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    digest = hashlib.sha256()
    _add(digest, examples)
    return digest.hexdigest()


def _add(digest: Any, items: Sequence[Any]) -> None:
    """Add what a sequence holds, or the digests of what it is made from."""
    if isinstance(items, Joined):
        for part in items.parts:
            _add(digest, part)
    elif isinstance(items, Mixture):
        _add(digest, items.whole)
        digest.update(repr([items.mixing, items.weights, items.seed]).encode())
    elif isinstance(items, Picked):
        _add(digest, items.whole)
        places = items.places
        digest.update(repr([len(places), _named(places)]).encode())
    elif isinstance(items, Examples):
        _add(digest, items.rows)
    elif hasattr(items, "digest"):
        digest.update(items.digest().encode())
    else:
        for item in items:
            digest.update(_content(item).encode() + b"\n")


def _named(places: Sequence[int]) -> Any:
    """What says which places are meant."""
    if isinstance(places, Others):
        return places.without
    return places if isinstance(places, range) else [*places]


def _content(item: Example | SourceRow) -> str:
    if isinstance(item, SourceRow):
        return repr(item.values)
    content: list[Any] = [item.messages, item.text, item.answer, item.meta]
    content += [part for part in (item.context, item.trained, item.numbers) if part]
    return json.dumps(content, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    # Sets come in another order in every process.
    return sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else repr(value)
