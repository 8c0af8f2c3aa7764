"""Values and turns of rows: what is text, what is a turn, and which turns are trained. What is neither is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterlab.json_text import parsed

Row = dict[str, Any]
Message = dict[str, Any]

# What a turn may say besides its content; a template that does not show it would lose a part of the conversation.
CALLS = ("tool_calls", "function_call")
SPOKEN = (*CALLS, "reasoning_content", "reasoning", "thinking")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_KNOWN = ("system", "developer", "user", "assistant", "tool")
_FLAGS = ("weight", "train", "training", "trainable", "loss", "loss_mask")  # each means: this turn is trained
_UNCLEAR = ("mask", "masked", "train_detail", "training_detail", "loss_scale")


class RowProblem(ValueError):
    """Why one row cannot be used; collected over all rows and reported together."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        message: `role`, `content`, and whatever else the row says about the turn, for the template to render.
        trained: whether the turn is to be learnt; None where nothing says so, which is yes for an assistant's.
        flag: the field of the row that says so, or "".
    """

    message: Message
    trained: bool | None = None
    flag: str = ""

    @property
    def learnt(self) -> bool:
        """Whether the turn is trained."""
        return self.message["role"] == "assistant" and self.trained is not False


def kind(value: Any) -> str:
    """Name the kind of a value, as messages do."""
    if value is None:
        return "null"
    return str(value) if isinstance(value, float) and not math.isfinite(value) else type(value).__name__


def filled(value: Any) -> bool:
    """Whether a value says anything: neither null, nor NaN, nor blank, nor an empty list or object."""
    if isinstance(value, (str, list, tuple, dict)):
        return bool(value.strip() if isinstance(value, str) else value)
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def text(row: Mapping[str, Any], column: str) -> str:
    """Return the text of a column that a row must have; numbers count as what is written there.

    Raises:
        RowProblem: the column is missing, empty, or something else.
    """
    if column not in row:
        raise RowProblem(f"column {column!r} is missing")
    value = row[column]
    number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not (number or isinstance(value, str)):
        raise RowProblem(f"column {column!r} is {kind(value)}, not text")
    if not str(value).strip():
        raise RowProblem(f"column {column!r} is empty")
    return str(value)


def optional_text(row: Mapping[str, Any], column: str) -> str:
    """Return the text of a column that may be missing, null or empty; then "".

    Raises:
        RowProblem: it is something else.
    """
    value = row.get(column)
    return "" if value is None or (isinstance(value, str) and not value.strip()) else text(row, column)


def turns(row: Mapping[str, Any], column: str, role: str | None = None) -> list[Turn]:
    """Return the turns that a column holds.

    Args:
        row: of the source.
        column: holds a list of turns.
        role: of the one turn that text in the column stands for; None: text is refused.

    Raises:
        RowProblem: a turn, or the column, is not understood.
    """
    value = row.get(column)
    if role is not None and not isinstance(value, (list, tuple)):
        return [Turn({"role": role, "content": text(row, column)})]
    if not isinstance(value, (list, tuple)):
        raise RowProblem(f"column {column!r} is {kind(value)}, not a list of turns")
    if not value:
        raise RowProblem(f"column {column!r} is empty")
    return [_turn(turn, i) for i, turn in enumerate(value, 1)]


def history(row: Mapping[str, Any]) -> list[Turn]:
    """Return the turns before a question: pairs of a question and its answer, or turns with roles.

    Raises:
        RowProblem: the column holds something else.
    """
    value = row.get("history")
    if not filled(value):
        return []
    if isinstance(value, (list, tuple)) and all(isinstance(turn, dict) for turn in value):
        return turns(row, "history")
    pairs = [_pair(pair) for pair in value] if isinstance(value, (list, tuple)) else [None]
    if None in pairs:
        raise RowProblem(
            f"column 'history' holds {_kinds(value)}, neither turns nor pairs of a question and its answer"
        )
    roles = ("user", "assistant")
    return [Turn({"role": r, "content": t}) for pair in pairs if pair for r, t in zip(roles, pair, strict=True)]


def _kinds(value: Any) -> str:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return ", ".join(dict.fromkeys(map(kind, parts)))


def _pair(value: Any) -> tuple[str, str] | None:
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(t, str) and t.strip() for t in value):
        return value[0], value[1]
    return None


def decoded(value: Any, where: str, of: str) -> Any:
    """Return what JSON in a text says; rows often hold tools and calls that way. Other values are returned as they are.

    Raises:
        RowProblem: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return parsed(value)
    except ValueError:
        raise RowProblem(f"{where} is text that is not JSON, not {of}") from None


def objects(value: Any, where: str, of: str) -> list[dict[str, Any]]:
    """Return a list of objects, which may be given as JSON in a text.

    Raises:
        RowProblem: it is something else.
    """
    found = decoded(value, where, of)
    if not isinstance(found, (list, tuple)) or not all(isinstance(part, dict) for part in found):
        raise RowProblem(f"{where} is {kind(found)}, not {of}")
    return list(found)


def content_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message's content."""
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(str(part["text"]) for part in content)


def _turn(turn: Any, position: int) -> Turn:
    where = f"turn {position}"
    if not isinstance(turn, dict):
        raise RowProblem(f"{where} is {kind(turn)}, not an object with role and content")
    role, content = _either(turn, "role", "from", where), _either(turn, "content", "value", where)
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _KNOWN:
        raise RowProblem(f"{where} has the role {role!r}; known: system, user, assistant, tool")
    where = f"{where} ({role})"
    trained, flag = _flag(turn, role, where)
    taken = {"role", "from", "content", "value", *_FLAGS}
    other = {k: v for k, v in turn.items() if k not in taken and v is not None and v != [] and v != ""}
    if "tool_calls" in other:
        other["tool_calls"] = objects(other["tool_calls"], f"tool_calls of {where}", "a list of calls")
    calls = any(field in other for field in CALLS)
    content = "" if content is None and calls else _content(content, where)
    if role == "assistant" and not calls and not filled(content):
        raise RowProblem(f"{where} has no text content")
    return Turn({"role": role, "content": content, **other}, trained, flag)


def _either(turn: Mapping[str, Any], ours: str, theirs: str, where: str) -> Any:
    found = [turn[name] for name in (ours, theirs) if turn.get(name) is not None]
    if len(found) == 2 and found[0] != found[1]:
        raise RowProblem(f"{where} has {ours!r} and {theirs!r}, which say different things")
    return found[0] if found else None


def _flag(turn: Mapping[str, Any], role: str, where: str) -> tuple[bool | None, str]:
    """Whether the row says that a turn is trained, and by which field."""
    for field in _UNCLEAR:
        if turn.get(field) is not None:
            raise RowProblem(f"{where} has {field}={turn[field]!r}: turns are trained whole or not at all ({_SAY})")
    said = {field: turn[field] for field in _FLAGS if turn.get(field) is not None}
    for field, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowProblem(f"{where} has {field}={value!r}: turns are trained whole or not at all ({_SAY})")
    if len(set(map(bool, said.values()))) > 1:
        raise RowProblem(f"{where} has {', '.join(said)}, which say different things")
    if not said:
        return None, ""
    flag, value = next(iter(said.items()))
    if value and role != "assistant":
        raise RowProblem(f"{where} has {flag}={value!r}, but only turns of the assistant can be trained")
    return bool(value), flag


_SAY = "train: true or false"


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)) or not content:
        raise RowProblem(f"{where} has no text content" + ("" if content in (None, []) else f", but {kind(content)}"))
    parts = [_part(part, where) for part in content]
    return parts[0]["text"] if len(parts) == 1 else parts  # one part of text is that text, in every template


def _part(part: Any, where: str) -> dict[str, str]:
    given = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {"type": kind(part)}
    if given.get("type") != "text" or not isinstance(given.get("text"), str):
        raise RowProblem(f"{where} has a part of type {given.get('type')!r} in its content; only text can be trained")
    if other := sorted(given.keys() - {"type", "text"}):
        raise RowProblem(f"{where} has a part of text with {', '.join(map(repr, other))}, which is not understood")
    return {"type": "text", "text": given["text"]}


def looks_like_turns(value: Any) -> bool:
    """Whether a value holds turns or pairs of texts, by its structure."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    names = ({"role", "content"}, {"from", "value"})
    return all(isinstance(t, dict) and any(n <= t.keys() for n in names) for t in value) or all(map(_pair, value))


def texts_in(value: Any) -> list[str]:
    """Return all texts within a value that are not names of roles."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [t for key, part in value.items() if key not in ("role", "from") for t in texts_in(part)]
    return [t for part in value for t in texts_in(part)] if isinstance(value, Sequence) else []
