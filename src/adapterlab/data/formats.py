"""Row formats: one table from column names to chat messages, and the detection that picks an entry of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterlab.data.config import DataConfig
from adapterlab.errors import DataError, nearest

Row = dict[str, Any]
Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One row, ready for a chat template.

    Attributes:
        messages: turns with `role` and `content`, the last one the assistant's; None for plain text.
        text: plain text to learn whole; None for messages.
        answer: reference that generated answers are scored against.
        meta: what a verifier needs besides, such as the generated entry.
        row: number of the row in its source, counted from 1 (for JSON Lines the line).
    """

    messages: tuple[Message, ...] | None = None
    text: str | None = None
    answer: str | None = None
    meta: dict[str, Any] = field(default_factory=dict, hash=False)
    row: int = 0

    @property
    def prompt(self) -> str:
        """What precedes the last answer, as plain text with single spaces: the identity of the question."""
        parts = [self.text or ""] if self.messages is None else [m["content"] for m in self.messages[:-1]]
        return " ".join(" ".join(parts).split())


@dataclass(frozen=True)
class SourceRow:
    """One raw row with the place it came from."""

    file: str
    number: int
    values: Row


class RowProblem(ValueError):
    """Why one row cannot be used; collected over all rows and reported together."""


@dataclass(frozen=True)
class Format:
    """How one row layout becomes messages.

    Attributes:
        columns: columns that must be there, with the kind of value that tells the format (str or list).
        optional: columns read when present.
        turns: from a row to messages; None when the row is plain text.
    """

    columns: dict[str, tuple[type, ...]]
    turns: Callable[[Row], list[Message]] | None
    optional: tuple[str, ...] = ()


def _string(row: Row, column: str) -> str:
    value = row.get(column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if column not in row:
        raise RowProblem(f"column {column!r} is missing")
    if not isinstance(value, str):
        raise RowProblem(f"column {column!r} is {'null' if value is None else type(value).__name__}, not text")
    if not value.strip():
        raise RowProblem(f"column {column!r} is empty")
    return value


_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def _turn(turn: Any, position: int) -> Message:
    if not isinstance(turn, dict):
        raise RowProblem(f"turn {position} is {type(turn).__name__}, not an object with role and content")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise RowProblem(f"turn {position} has the role {role!r}; known: system, user, assistant, tool")
    if not isinstance(content, str) or (role == "assistant" and not content.strip()):
        raise RowProblem(f"turn {position} ({role}) has no text content")
    return {"role": role, "content": content}


def _turns(row: Row, column: str, role: str | None = None) -> list[Message]:
    value = row.get(column)
    if role is not None and not isinstance(value, (list, tuple)):
        return [{"role": role, "content": _string(row, column)}]
    if not isinstance(value, (list, tuple)):
        raise RowProblem(
            f"column {column!r} is {'null' if value is None else type(value).__name__}, not a list of turns"
        )
    if not value:
        raise RowProblem(f"column {column!r} is empty")
    return [_turn(turn, i) for i, turn in enumerate(value, 1)]


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _alpaca(row: Row) -> list[Message]:
    asked = _string(row, "instruction") + (f"\n\n{row['input']}" if row.get("input") else "")
    return [*_system(row), {"role": "user", "content": asked}, *_turns(row, "output", "assistant")]


def _pair(prompt: str, completion: str) -> Callable[[Row], list[Message]]:
    return lambda row: [*_system(row), *_turns(row, prompt, "user"), *_turns(row, completion, "assistant")]


_TEXT, _LIST, _EITHER = (str, int, float), (list, tuple), (str, int, float, list, tuple)

FORMATS: dict[str, Format] = {
    "messages": Format({"messages": _LIST}, lambda row: [*_system(row), *_turns(row, "messages")], ("system",)),
    "sharegpt": Format(
        {"conversations": _LIST}, lambda row: [*_system(row), *_turns(row, "conversations")], ("system",)
    ),
    "alpaca": Format({"instruction": _TEXT, "output": _TEXT}, _alpaca, ("input", "system")),
    "prompt-completion": Format({"prompt": _EITHER, "completion": _EITHER}, _pair("prompt", "completion"), ("system",)),
    "question-answer": Format({"question": _TEXT, "answer": _TEXT}, _pair("question", "answer"), ("system",)),
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
    for source in rows[:100]:
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
    problem = f"fits more than one format ({', '.join(fits)})" if fits else "fits no known format"
    raise DataError(
        f"The layout of {rows[0].file} {problem}. Columns found: {', '.join(map(str, seen)) or 'none'}.\n"
        f"Known formats and their columns (optional ones in brackets):\n{table}\n"
        f"Choose one with data.format, or name your columns with data.columns, "
        f"such as data.columns='{{prompt: your_column, completion: your_other_column}}'."
    )


def renamed(source: SourceRow, columns: dict[str, str]) -> SourceRow:
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


def _check_renaming(rows: Sequence[SourceRow], columns: dict[str, str]) -> None:
    found = {str(k) for source in rows for k in source.values}
    for ours, theirs in columns.items():
        if theirs not in found:
            raise DataError(
                f"data.columns names {theirs!r} for {ours!r}, but {rows[0].file} has no such column. "
                f"{nearest(theirs, found)}"
            )


def examples_from(rows: Sequence[SourceRow], cfg: DataConfig) -> tuple[list[Example], str]:
    """Turn raw rows into examples.

    Args:
        rows: at least one raw row.
        cfg: format, column names and system message.

    Returns:
        The examples and the format's name.

    Raises:
        DataError: the format is unclear, or rows lack what it needs; the message counts and names them.
    """
    _check_renaming(rows, cfg.columns)
    rows = [renamed(source, cfg.columns) for source in rows]
    name = detect(rows, cfg)
    examples: list[Example] = []
    bad: list[str] = []
    for source in rows:
        try:
            examples.append(_example(source, FORMATS[name], cfg.system))
        except RowProblem as problem:
            bad.append(f"  row {source.number} of {source.file}: {problem}")
    if bad:
        more = f"\n  ... and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(
            f"{len(bad)} of {len(rows)} rows cannot be used as {name!r}:\n" + "\n".join(bad[:5]) + more + "\n"
            "Mend or remove these rows; if the columns are the wrong ones, set data.format or data.columns."
        )
    return examples, name


def _example(source: SourceRow, known: Format, system: str | None) -> Example:
    if not source.values:
        raise RowProblem("the row is empty")
    if known.turns is None:
        return Example(text=_string(source.values, "text"), row=source.number)
    messages = known.turns(source.values)
    # Turns after the last answer have nothing to learn from and no answer to score.
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if len([m for m in messages if m["role"] != "system"]) < 2:
        raise RowProblem("there is no assistant turn that answers something")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Example(messages=tuple(messages), answer=_reference(messages[-1]["content"]), row=source.number)


def _reference(completion: str) -> str:
    """The part of a completion to score against: the number after a final `####`, else all of it."""
    marked = re.search(r"####\s*([-−]?\$?[\d.,]*\d)\s*$", completion)
    return marked.group(1).replace(",", "") if marked else completion.strip()
