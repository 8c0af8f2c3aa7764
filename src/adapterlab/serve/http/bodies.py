"""Bodies of requests: read once it is known who asks, and understood or refused by name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Depends, Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from adapterlab.json_text import parsed
from adapterlab.serve.http.access import needs
from adapterlab.serve.http.faults import GONE, Refusal, invalid
from adapterlab.serve.http.keys import Caller, Scope
from adapterlab.serve.http.schemas import Strict

B = TypeVar("B", bound=Strict)


def body(kind: type[B], scope: Scope) -> Callable[..., Awaitable[B]]:
    """Make a dependency that reads the body of a request, not before its key was found good.

    Args:
        kind: of object that the body has to be.
        scope: that the caller's key must have.

    Returns:
        A function that raises `Refusal`: for the key as `access.needs` does, then 400 for a body that is none of the
        kind, each fault with its field.
    """
    known = Depends(needs(scope))

    async def read(request: Request, caller: Caller = known) -> B:
        _check_type(request.headers.get("content-type", ""))
        try:
            text = await request.body()
        except ClientDisconnect:
            raise Refusal(GONE, "The client went away while it was asking.") from None
        try:
            found = parsed(text.decode())
        except ValueError as error:
            raise Refusal(400, f"The body is no JSON: {error}.") from None
        try:
            return kind.model_validate(found)
        except ValidationError as error:
            raise invalid(error.errors(include_url=False), found) from None

    return read


def _check_type(sent: str) -> None:
    """Refuse what a page of another site may send without asking first whether it may."""
    kind = sent.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Refusal(400, f"The body is read as JSON, and was sent as {sent or 'nothing'!r}. Send it with "
                      "Content-Type: application/json.")  # fmt: skip
