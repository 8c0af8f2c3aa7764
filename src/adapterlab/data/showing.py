"""What a chat template shows of a conversation: a part that it leaves out would be lost without a word.

Nothing is read from a template's source: a part is shown where the text without it is another one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from adapterlab.data.formats import Example
from adapterlab.data.turns import CALLS, SPOKEN, Message
from adapterlab.json_text import parsed

Render = Callable[[Sequence[Message], Mapping[str, Any]], str]
RENDERING = (TemplateError, TypeError, ValueError, IndexError, KeyError, AttributeError)  # what a template may raise


class Showing:
    """Compares what conversations say with the text that a template makes of them.

    Attributes:
        unshown: names of what was not shown and may be missing, such as the ids of calls.
    """

    def __init__(self, render: Render):
        self.render = render
        self.unshown: dict[str, None] = {}
        self._arguments: tuple[bool, bool] | None = None

    def problems(self, example: Example, shown: str) -> list[str]:
        """Say what of an example its text does not show and must not be missing.

        Args:
            example: with messages.
            shown: the text.
        """
        messages, found = example.messages or (), []
        for i, message in enumerate(messages):
            where, content = f"turn {i + 1} ({message['role']})", message["content"]
            if not isinstance(content, str):
                if repr(content) in shown or json.dumps(content, ensure_ascii=False) in shown:
                    found.append(f"{where} has {len(content)} parts, which are written as code; join them to one text")
            elif message["role"] != "assistant" and content.strip() not in shown:
                blank = [*messages[:i], {**message, "content": ""}, *messages[i + 1 :]]
                found += [f"{where} is left out"] if self._same(shown, blank, example.context) else []
        return [*found, *self._of_context(example, shown), *self._of_fields(example, shown)]

    def _same(self, shown: str, messages: Sequence[Message], context: Mapping[str, Any]) -> bool:
        try:
            return self.render(messages, context) == shown
        except RENDERING:  # the template asks for it, so it looks at it
            return False

    def _of_context(self, example: Example, shown: str) -> list[str]:
        found = []
        for name in example.context:
            less = {k: v for k, v in example.context.items() if k != name}
            if self._same(shown, example.messages or (), less):
                if name in ("tools", "documents"):
                    found.append(f"column {name!r} is left out")
                else:
                    self.unshown[f"chat_template_kwargs.{name}"] = None
        return found

    def _of_fields(self, example: Example, shown: str) -> list[str]:
        """What turns say besides their content."""
        messages = example.messages or ()
        fields = dict.fromkeys(k for m in messages for k in m if k not in ("role", "content"))
        found = [
            problem for i, m in enumerate(messages) if "tool_calls" in m for problem in self._calls(example, shown, i)
        ]
        for field in [f for f in fields if f in SPOKEN and f != "tool_calls"]:
            at = [i for i, m in enumerate(messages) if field in m]
            missing = [i for i in at if self._same(shown, _less(messages, {field}, i), example.context)]
            if len(missing) == len(at) or (missing and field in CALLS):
                found.append(f"{field} of turn {missing[0] + 1} is left out")
            elif missing:
                self.unshown[f"{field} of some turns"] = None
        rest = {f for f in fields if f not in SPOKEN}
        if rest and self._same(shown, _less(messages, rest), example.context):
            self.unshown |= dict.fromkeys(f for f in fields if f in rest)
        else:
            self.unshown |= {f: None for f in rest if self._same(shown, _less(messages, {f}), example.context)}
        return found

    def _calls(self, example: Example, shown: str, i: int) -> list[str]:
        messages = list(example.messages or ())
        calls, found = messages[i]["tool_calls"], []
        for k in range(len(calls)):
            fewer = {**messages[i], "tool_calls": [*calls[:k], *calls[k + 1 :]]}
            less = _less([fewer], {"tool_calls"})[0] if len(calls) == 1 else fewer
            if self._same(shown, [*messages[:i], less, *messages[i + 1 :]], example.context):
                found.append(f"call {k + 1} of turn {i + 1} is left out")
        return found

    def settled(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages with the arguments of calls in the form that the template writes as JSON.

        Rows give arguments as an object or as JSON in a text; templates that know one of them write the other as a
        quoted text, or as Python.
        """
        if not any("tool_calls" in m for m in messages):
            return list(messages)
        return [
            {**m, "tool_calls": [self._call(c) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in messages
        ]

    def _call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call.get("function"), dict) else call
        if not isinstance(arguments := function.get("arguments"), (str, dict)):
            return call
        if self._arguments is None:
            self._arguments = self._takes('{"a": "b"}'), self._takes({"a": "b"})
        takes_text, takes_object = self._arguments
        if isinstance(arguments, str) and takes_object and not takes_text:
            try:
                made = parsed(arguments)
            except ValueError:
                return call
        elif isinstance(arguments, dict) and takes_text and not takes_object:
            made = json.dumps(arguments, ensure_ascii=False)
        else:
            return call
        if not isinstance(made, (str, dict)):
            return call
        changed = {**function, "arguments": made}
        return changed if function is call else {**call, "function": changed}

    def _takes(self, arguments: Any) -> bool:
        """Whether the template writes arguments of a call in this form as they should be."""
        function = {"name": "probe", "arguments": arguments}
        calls = [{"type": "function", "id": "probe0000", "function": function}]
        tool = {"name": "probe", "description": "probe", "parameters": {"type": "object", "properties": {}}}
        messages: list[Message] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
        try:
            shown = self.render(messages, {"tools": [{"type": "function", "function": tool}]})
        except RENDERING:
            return False
        return '{"a": "b"}' in shown if isinstance(arguments, str) else "'a'" not in shown


def _less(messages: Sequence[Message], fields: set[str], at: int | None = None) -> list[Message]:
    """Messages without some fields: all of them, or one."""
    return [
        {k: v for k, v in m.items() if k not in fields} if at is None or i == at else m for i, m in enumerate(messages)
    ]
