"""What is wrong with a request, in the form that OpenAI's clients understand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterlab.errors import (
    AdapterlabError,
    BusyError,
    ConfigError,
    DataError,
    FormatError,
    MissingDependencyError,
    OutputError,
    UnknownAdapterError,
    UnusableAdapterError,
)

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_PLAIN_KINDS = {429: "overloaded", 503: "overloaded", 504: "incomplete_generation"}
_RETRY = {"Retry-After": "1"}
GONE = 499  # what nginx writes down for a client that did not wait; nobody reads it
_SHOWN = 80  # characters of a value that is not valid


class Refusal(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: for people.
        code: for programs, or None.
        param: the field of the request that is wrong, or None.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API writes it."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def plain(self) -> dict[str, str]:
        """The error as TGI and LoRAX write it."""
        kind = _PLAIN_KINDS.get(self.status, "generation" if self.status >= 500 else "validation")
        return {"error": self.message, "error_type": kind}


def refusal_of(error: AdapterlabError) -> Refusal:
    """Choose the status for an error of the library; what is nobody's fault but ours is a 500."""
    text = str(error)
    match error:
        case UnknownAdapterError():
            return Refusal(404, text, code="model_not_found", param="model")
        case UnusableAdapterError():
            return Refusal(400, text, code="adapter_unusable", param="model")
        case BusyError():
            return Refusal(429, text, code="busy", headers=_RETRY)
        case ConfigError() | DataError() | FormatError() | MissingDependencyError():
            return Refusal(400, text)
        case OutputError():
            return Refusal(507, text, code="disk_full")
        case _:
            return Refusal(500, text)


def unavailable(why: str) -> Refusal:
    """The refusal of a server that will answer again."""
    return Refusal(503, why, code="unavailable", headers=_RETRY)


def invalid(faults: Sequence[Mapping[str, Any]], body: Any) -> Refusal:
    """Say what pydantic found, each with the field and the value received.

    Args:
        faults: as of `ValidationError.errors()`.
        body: in which it found them.
    """
    places = [_place(fault, body) for fault in faults]
    lines = [_line(place, fault) for place, fault in zip(places, faults, strict=True)]
    return Refusal(400, "\n".join(dict.fromkeys(lines)), param=next((p for p in places if p), None))


def _place(fault: Mapping[str, Any], body: Any) -> str:
    """The field of a fault, without what pydantic adds: which of several types it had tried there."""
    steps, here = list[str](), body
    for part in fault["loc"]:
        is_there = part in here if isinstance(here, dict) else isinstance(here, list) and isinstance(part, int)
        if is_there:
            here = here[part]
        if is_there or (fault["type"] == "missing" and part == fault["loc"][-1]):
            steps.append(str(part))
    return ".".join(steps)


def _line(place: str, fault: Mapping[str, Any]) -> str:
    said = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] in ("value_error", "missing"):
        return f"{place}: {said}" if place else said
    received = repr(fault.get("input"))
    cut = received if len(received) <= _SHOWN else received[: _SHOWN - 3] + "..."
    return f"{place or 'the body'} = {cut} is not valid: {said[:1].lower() + said[1:]}."
