"""Row formats: one table from column names to chat messages, and the detection that picks an entry of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterlab.data.config import COLUMNS, DataConfig
from adapterlab.data.turns import (
    CALLS,
    Message,
    Row,
    RowProblem,
    Turn,
    content_text,
    decoded,
    filled,
    history,
    kind,
    looks_like_turns,
    objects,
    optional_text,
    text,
    texts_in,
    turns,
)
from adapterlab.data.views import Lookup, block_of
from adapterlab.errors import DataError, nearest

_DECIDING = 100  # rows that tell the format
_LOOKED_AT = 1000  # rows of many that are read before the first step
Numbers = Mapping[str, tuple[int, ...]]  # columns that hold whole numbers, and which of them; (): any


@dataclass(frozen=True)
class Example:
    """One row, ready for a chat template.

    Attributes:
        messages: turns with `role`, `content` and what else the row says of them, the last one the assistant's; None
            for plain text.
        text: plain text to learn whole; None for messages.
        answer: reference that generated answers are scored against.
        meta: what a verifier needs besides, such as the generated entry.
        row: number of the row in its source, counted from 1 (for JSON Lines the line).
        context: what the template gets besides the messages, such as `tools`.
        trained: for each message whether it is learnt; None: all of the assistant's are.
        numbers: what a method reads beside the text, by the column.
    """

    messages: tuple[Message, ...] | None = None
    text: str | None = None
    answer: str | None = None
    meta: dict[str, Any] = field(default_factory=dict, hash=False)
    row: int = 0
    context: dict[str, Any] = field(default_factory=dict, hash=False)
    trained: tuple[bool, ...] | None = None
    numbers: dict[str, int] = field(default_factory=dict, hash=False)

    @property
    def prompt(self) -> str:
        """What precedes the last answer, as plain text with single spaces: the identity of the question."""
        parts = [self.text or ""] if self.messages is None else [content_text(m) for m in self.messages[:-1]]
        return " ".join(" ".join(parts).split())


@dataclass(frozen=True)
class SourceRow:
    """One raw row with the place it came from."""

    file: str
    number: int
    values: Row


@dataclass(frozen=True)
class Columns:
    """Which columns of rows became examples.

    Attributes:
        used: names of the columns that were read.
        unused: those that were not, and hold something in some row.
    """

    used: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.used:
            return "generated"
        return f"{', '.join(self.used)} used; not used: {', '.join(self.unused) or 'none'}"

    def joined(self, other: Columns) -> Columns:
        """Return the columns of two sets of rows; what one of them reads was read."""
        used = dict.fromkeys(self.used + other.used)
        return Columns(tuple(used), tuple(c for c in dict.fromkeys(self.unused + other.unused) if c not in used))


@dataclass(frozen=True)
class Format:
    """How one row layout becomes messages.

    Attributes:
        columns: columns that must be there, with the kind of value that tells the format (str or list).
        optional: columns read when present.
        turns: from a row to turns, without those of the columns that all formats share; None for plain text.
    """

    columns: dict[str, tuple[type, ...]]
    turns: Callable[[Row], list[Turn]] | None
    optional: tuple[str, ...] = ()

    @property
    def read(self) -> tuple[str, ...]:
        """All columns that the format reads."""
        return (*self.columns, *self.optional)


_BESIDE = ("system", "tools", "documents", "chat_template_kwargs")  # columns of every format but plain text
_OURS = ("messages", "conversations", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize")


def _alpaca(row: Row) -> list[Turn]:
    given = optional_text(row, "input")
    asked = text(row, "instruction") + (f"\n\n{given}" if given else "")
    return [*history(row), Turn({"role": "user", "content": asked}), *turns(row, "output", "assistant")]


def _pair(prompt: str, completion: str) -> Callable[[Row], list[Turn]]:
    def read(row: Row) -> list[Turn]:
        # Of what was said before, the prompt's own answers included, nothing is the completion.
        asked = [Turn(t.message, t.trained or False, t.flag) for t in turns(row, prompt, "user")]
        return [*history(row), *asked, *turns(row, completion, "assistant")]

    return read


_TEXT, _LIST, _EITHER = (str, int, float), (list, tuple), (str, int, float, list, tuple)

FORMATS: dict[str, Format] = {
    "messages": Format({"messages": _LIST}, lambda row: turns(row, "messages"), _BESIDE),
    "sharegpt": Format({"conversations": _LIST}, lambda row: turns(row, "conversations"), _BESIDE),
    "alpaca": Format({"instruction": _TEXT, "output": _TEXT}, _alpaca, ("input", "history", *_BESIDE)),
    "prompt-completion": Format(
        {"prompt": _EITHER, "completion": _EITHER}, _pair("prompt", "completion"), ("history", *_BESIDE)
    ),
    "question-answer": Format({"question": _TEXT, "answer": _TEXT}, _pair("question", "answer"), ("history", *_BESIDE)),
    "text": Format({"text": _TEXT}, None),
}


def detect(rows: Sequence[SourceRow], cfg: DataConfig) -> str:
    """Tell the format of rows from column names and kinds of values.

    Columns may be missing or null in some rows, so that one bad row does not hide the format.

    Args:
        rows: raw rows, columns already renamed.
        cfg: its `format`, when not "auto", is taken as it is.

    Returns:
        A key of `FORMATS`.

    Raises:
        DataError: no format fits, or more than one.
    """
    if cfg.format != "auto":
        return cfg.format
    seen: Row = {}
    for source in rows[:_DECIDING]:
        seen = {**source.values, **seen}
    fits = [
        name
        for name, known in FORMATS.items()
        if all(c in seen and (seen[c] is None or isinstance(seen[c], kinds)) for c, kinds in known.columns.items())
    ]
    if len(fits) > 1 and "text" in fits:
        fits.remove("text")  # beside structured columns it is a rendered copy of them
    if len(fits) == 1:
        return fits[0]
    table = "\n".join(
        f"  {name}: {', '.join(known.columns)}" + (f" ({', '.join(known.optional)})" if known.optional else "")
        for name, known in FORMATS.items()
    )
    problem = f"fits more than one format ({', '.join(fits)})" if fits else "fits no known format" + _nearly(seen)
    raise DataError(
        f"The layout of {rows[0].file} {problem}. Columns found: {', '.join(map(str, seen)) or 'none'}.\n"
        f"Known formats and their columns (optional ones in brackets):\n{table}\n"
        f"Choose one with data.format, or name your columns with data.columns, "
        f"such as data.columns='{{prompt: your_column, completion: your_other_column}}'."
    )


def _nearly(seen: Row) -> str:
    """Which columns have the names of a format and other kinds of values."""
    for name, known in FORMATS.items():
        if all(c in seen for c in known.columns):
            wrong = [c for c, kinds in known.columns.items() if not isinstance(seen[c], (*kinds, type(None)))]
            found = ", ".join(f"{c!r} is {kind(seen[c])}" for c in wrong)
            return f" (its columns are those of {name}, but {found})"
    return ""


def renamed(source: SourceRow, columns: Mapping[str, str]) -> SourceRow:
    """Give a row our column names.

    Args:
        source: the raw row.
        columns: our name to the user's name.

    Returns:
        The row with the user's names replaced; a column missing from this row stays missing.
    """
    theirs = set(columns.values())
    values = {k: v for k, v in source.values.items() if k not in theirs}
    values |= {ours: source.values[name] for ours, name in columns.items() if name in source.values}
    return SourceRow(source.file, source.number, values)


def _without(source: SourceRow, ignore: Iterable[str]) -> SourceRow:
    """A row without the columns, and its turns without the fields, that may be left out."""

    def less(value: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in value.items() if k not in ignore}

    values = {
        k: [less(t) if isinstance(t, dict) else t for t in v] if isinstance(v, (list, tuple)) else v
        for k, v in less(source.values).items()
    }
    return SourceRow(source.file, source.number, values)


def _check_renaming(rows: Sequence[SourceRow], columns: Mapping[str, str], ignore: Collection[str]) -> None:
    """Refuse names that no row has, and names that would hide a column of the row's own."""
    missing, found = set(columns.values()), set[str]()
    for source in rows:
        names = {str(name) for name in source.values if name not in ignore}
        found, missing = found | names, missing - names
        if not missing and len(rows) > _LOOKED_AT:  # the others are looked at when they are read
            break
    for ours, theirs in columns.items():
        if theirs in missing:
            raise DataError(
                f"data.columns names {theirs!r} for {ours!r}, but {rows[0].file} has no such column. "
                f"{nearest(theirs, found)}"
            )
    _check_hidden(rows[0].file, found, columns)


def _check_hidden(file: str, found: Iterable[str], columns: Mapping[str, str]) -> None:
    for ours, theirs in columns.items():
        if ours in found and ours not in columns.values():
            raise DataError(
                f"data.columns names {theirs!r} for {ours!r}, but {file} has a column {ours!r} as well, which "
                f"would be lost. Name that one too, or leave it out with data.ignore='[{ours}]'."
            )


@dataclass(frozen=True)
class Layout:
    """How the rows of a source become examples.

    Attributes:
        name: of the format.
        cfg: column names, columns to ignore and system message.
        numbers: further columns that every row has to have, and the numbers that may stand there.
    """

    name: str
    cfg: DataConfig
    numbers: Numbers

    def read(self, rows: Sequence[SourceRow]) -> tuple[list[Example], Columns]:
        """Turn raw rows into examples.

        Returns:
            The examples, and which columns were read.

        Raises:
            DataError: rows lack what the format needs or hold what is not understood; the message counts and names
                them.
        """
        examples: list[Example] = []
        bad: list[str] = []
        seen: dict[str, None] = {}
        for given in rows:
            source = _without(given, self.cfg.ignore) if self.cfg.ignore else given
            _check_hidden(source.file, map(str, source.values), self.cfg.columns)
            source = renamed(source, self.cfg.columns)
            try:
                examples.append(self._example(source))
                seen |= dict.fromkeys(str(c) for c, value in source.values.items() if filled(value))
            except RowProblem as problem:
                bad.append(f"  row {source.number} of {source.file}: {problem}")
        if bad:
            more = f"\n  ... and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise DataError(
                f"{len(bad)} of {len(rows)} rows cannot be used as {self.name!r}:\n" + "\n".join(bad[:5]) + more + "\n"
                "Mend or remove these rows; if the columns are the wrong ones, set data.format or data.columns; name "
                "what may be left out, columns or fields of turns, in data.ignore."
            )
        return examples, self.columns(seen)

    def columns(self, seen: Iterable[str]) -> Columns:
        """Say which of the columns that hold something become examples."""
        read = (*FORMATS[self.name].read, *self.numbers)
        return Columns(tuple(c for c in seen if c in read), tuple(c for c in seen if c not in read))

    def _example(self, source: SourceRow) -> Example:
        rest = SourceRow(source.file, source.number, {k: v for k, v in source.values.items() if k not in self.numbers})
        example = _example(rest, FORMATS[self.name], self.cfg)
        return dataclasses.replace(example, numbers=_numbers(source.values, self.numbers)) if self.numbers else example


def layout_of(rows: Sequence[SourceRow], cfg: DataConfig, numbers: Numbers | None = None) -> Layout:
    """Find out how rows become examples.

    Args:
        rows: at least one raw row.
        cfg: format, column names and system message.
        numbers: further columns that every row has to have, and the numbers that may stand there.

    Raises:
        DataError: the format is unclear, or columns that were named are not there.
    """
    if cfg.columns:
        _check_renaming(rows, cfg.columns, cfg.ignore)
    first = [_without(source, cfg.ignore) for source in block_of(rows, 0, min(len(rows), _DECIDING))]
    return Layout(detect([renamed(source, cfg.columns) for source in first], cfg), cfg, numbers or {})


class Examples(Lookup[Example]):
    """The examples of many rows, each made when somebody asks for it.

    Attributes:
        rows: the raw rows.
        layout: how they become examples.
    """

    def __init__(self, rows: Sequence[SourceRow], layout: Layout):
        self.rows, self.layout = rows, layout
        self.columns = layout.read(block_of(rows, 0, min(len(rows), _LOOKED_AT)))[1]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, index: int) -> Example:
        """Return an example."""
        return self.layout.read([self.rows[index]])[0][0]

    def block(self, start: int, stop: int) -> list[Example]:
        """Return examples that stand behind each other."""
        found, more = self.layout.read(block_of(self.rows, start, stop))
        self.columns = self.columns.joined(more)
        return found


def _numbers(row: Row, numbers: Numbers) -> dict[str, int]:
    """What a row has in the columns that a method reads."""
    found: dict[str, int] = {}
    for column, allowed in numbers.items():
        value = row.get(column)
        if value is None:
            others = nearest(column, [str(name) for name in row if name != column])
            raise RowProblem(f"there is nothing in column {column!r}, which the method reads. {others}")
        number = _whole(value)
        if number is None or (allowed and number not in allowed):
            wanted = f"one of {', '.join(map(str, allowed))}" if allowed else "a whole number"
            raise RowProblem(f"column {column!r} is {value!r}, and the method reads {wanted} there")
        found[column] = number
    return found


def _whole(value: Any) -> int | None:
    """A whole number, written in whatever way, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def _example(source: SourceRow, known: Format, cfg: DataConfig) -> Example:
    row = source.values
    if not row:
        raise RowProblem("the row is empty")
    _check_unread(row, known)
    if known.turns is None:
        return Example(text=text(row, "text"), row=source.number)
    found = _with_system(row, known.turns(row), cfg.system)
    # What follows the last trained answer has nothing to learn from and no answer to score.
    while found and not found[-1].learnt:
        found.pop()
    messages = [turn.message for turn in found]
    if len([m for m in messages if m["role"] != "system"]) < 2:
        raise RowProblem("there is no assistant turn that answers something and is to be trained")
    skipped = [turn for turn in found if turn.message["role"] == "assistant" and not turn.learnt]
    if cfg.train_on == "all" and (flag := next((turn.flag for turn in skipped if turn.flag), "")):
        raise RowProblem(f"a turn has {flag}=false, but data.train_on=all trains everything")
    return Example(
        messages=tuple(messages),
        answer=_reference(messages[-1]),
        row=source.number,
        context=_context(row),
        trained=tuple(turn.learnt for turn in found) if skipped and cfg.train_on != "all" else None,
    )


def _with_system(row: Row, found: list[Turn], system: str | None) -> list[Turn]:
    own, first = optional_text(row, "system"), found[0].message
    if own and first["role"] in ("system", "developer") and first["content"] != own:
        raise RowProblem(f"column 'system' and turn 1 ({first['role']}) are two system messages")
    if first["role"] in ("system", "developer") or not (own or system):
        return found
    return [Turn({"role": "system", "content": own or system}), *found]


def _context(row: Row) -> dict[str, Any]:
    """What a template gets besides the messages."""
    found: dict[str, Any] = {}
    for column in ("tools", "documents"):
        if filled(row.get(column)):
            found[column] = objects(row[column], f"column {column!r}", "a list of objects")
    settings = decoded(row.get("chat_template_kwargs"), "column 'chat_template_kwargs'", "an object")
    if filled(settings):
        if not isinstance(settings, dict):
            raise RowProblem(f"column 'chat_template_kwargs' is {kind(settings)}, not an object")
        if taken := [name for name in settings if name in (*_OURS, *found)]:
            raise RowProblem(f"column 'chat_template_kwargs' may not set {taken[0]!r}")
        found |= settings
    return {name: value for name, value in found.items() if filled(value)}


# Columns that would change what is learnt, and what each of them asks for; told only where the values are of that kind.
_ASKS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("image", "images", "video", "videos", "audio", "audios"), lambda v: True, "holds more than text"),
    (("functions",), lambda v: True, "describes tools: name it with data.columns='{tools: functions}'"),
    (
        ("assistant_masks", "completion_mask", "loss_mask", "labels", "input_ids", "attention_mask"),
        lambda v: isinstance(v, (list, tuple)),
        "speaks of single tokens, which are made anew here",
    ),
    (
        ("weight", "train", "sample_weight", "loss_weight"),
        lambda v: isinstance(v, (bool, int, float)) and v != 1,
        "weighs whole rows, but all rows count the same here",
    ),
    (("label",), lambda v: v is False, "says that the answer is not wanted"),
)


def _check_unread(row: Row, known: Format) -> None:
    """Refuse a column that the format does not read and that would change what is learnt.

    What repeats the turns, such as a rendered copy of them, is not needed; what says nothing on them is named later.
    """
    used = texts_in([row[column] for column in known.read if column in row])
    for column, value in row.items():
        if column in known.read or not filled(value):
            continue
        name = str(column).strip().casefold()
        if name in known.read:
            raise RowProblem(f"column {column!r} is not read, but {name!r} is: name it with data.columns")
        asks = next((why for names, fits, why in _ASKS if name in names and fits(value)), None)
        if asks is None and (name in COLUMNS or looks_like_turns(value)) and not _repeats(value, used):
            asks = "says what the turns of this format do not"
        if asks is not None:
            raise RowProblem(f"column {column!r} {asks}")


def _repeats(value: Any, used: Sequence[str]) -> bool:
    """Whether texts say nothing that is not used: parts of it, or a rendered copy that holds all of it."""
    found, whole = texts_in(value) or [str(value)], "\n".join(used)
    return all(t.strip() in whole for t in found) or all(t.strip() in "\n".join(found) for t in used)


def _reference(message: Message) -> str | None:
    """The part of an answer to score against: the number after a final `####`, else all of it; None for calls."""
    if any(field in message for field in CALLS):
        return None
    completion = content_text(message)
    marked = re.search(r"####\s*([-−]?\$?[\d.,]*\d)\s*$", completion)
    return marked.group(1).replace(",", "") if marked else completion.strip()
