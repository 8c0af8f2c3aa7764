"""Calls of tools in what a model wrote."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from adapterlab.json_text import parsed

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(f"{re.escape(_OPEN)}\\s*(.*?)\\s*(?:{re.escape(_CLOSE)}|$)", re.DOTALL)


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
