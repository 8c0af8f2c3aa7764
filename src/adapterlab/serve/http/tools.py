"""Calls of tools: taken out of what a model wrote, or the only thing that it may write."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from adapterlab.json_text import parsed

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(f"{re.escape(_OPEN)}\\s*(.*?)\\s*(?:{re.escape(_CLOSE)}|$)", re.DOTALL)

_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}  # of a function without parameters


def call_schema(functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of one of some functions: `{"name": ..., "arguments": {...}}`.

    Args:
        functions: as a request describes them, with the schema of their `parameters`.
    """
    each = [_one_call(function, f"/anyOf/{i}/properties/arguments") for i, function in enumerate(functions)]
    return {"anyOf": each}


def _one_call(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    arguments = _moved(function.get("parameters") or _NOTHING, place)
    parts = {"name": {"const": function["name"]}, "arguments": arguments}
    return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references hold at another place of a document."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = f"#{place}{reference[1:]}"
    return moved


def forced_call(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Read an answer that could be nothing but a call; one that was cut off stays a text."""
    try:
        return "", [_written(parsed(text))]
    except (ValueError, KeyError, TypeError):
        return text, []


def calls_in(tokenizer: Any, template: str | None, text: str) -> tuple[str, list[dict[str, Any]]]:
    """Take the calls out of an answer.

    They are read as the tokenizer says (`response_schema`), or between the tags that the template itself writes around
    calls. What cannot be read as a call stays in the text.

    Args:
        tokenizer: of the base.
        template: of the adapter, or None for the base's.
        text: of the answer.

    Returns:
        The rest of the text, and the calls as OpenAI's API writes them.
    """
    if getattr(tokenizer, "response_schema", None):
        message = tokenizer.parse_response(text)
        return str(message.get("content") or ""), [
            _written(call.get("function", call)) for call in message.get("tool_calls") or ()
        ]
    if _OPEN not in (template or tokenizer.chat_template or ""):
        return text, []
    calls: list[dict[str, Any]] = []

    def taken(found: re.Match[str]) -> str:
        try:
            call = parsed(found[1])
            calls.append(_written(call))
        except (ValueError, KeyError, TypeError, AttributeError):
            return found[0]
        return ""

    rest = _CALL.sub(taken, text)
    return (rest.strip() if calls else text), calls


def _written(call: Any) -> dict[str, Any]:
    name, arguments = call["name"], call.get("arguments", {})
    if not isinstance(name, str):
        raise TypeError("the name of a function is a text")
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": {"name": name, "arguments": written}}
