"""Who may come in: keys with scopes, and names of this machine alone where there are no keys."""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Awaitable, Callable

from fastapi import Request

from adapterlab.serve.http.faults import Refusal
from adapterlab.serve.http.keys import Caller, Scope
from adapterlab.serve.http.service import Service

_PORT = re.compile(r":\d+$")


async def service_of(request: Request) -> Service:
    """The service that a request came to."""
    found: Service = request.app.state.service
    return found


@functools.cache  # asked for by a route and by the reader of its body, it runs once
def needs(scope: Scope) -> Callable[[Request], Awaitable[Caller]]:
    """Make a dependency that says who asks.

    Args:
        scope: that the caller's key must have.

    Returns:
        A function that raises `Refusal`: 401 without a valid key, 403 where the key's scopes do not hold `scope`.
    """

    async def caller(request: Request) -> Caller:
        service = await service_of(request)
        host = _PORT.sub("", request.headers.get("host", ""))
        if service.keys is None and not is_local(host):
            # A page in somebody's browser can reach this machine under a name of its own (DNS rebinding).
            raise Refusal(403, "Without keys this server answers to localhost alone. Start it with --keys FILE.")
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        found = service.caller(key.strip() if kind.lower() == "bearer" else None)
        if found is None:
            raise Refusal(
                401, "A key is needed, as 'Authorization: Bearer KEY', and this is none that is known here.",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        if scope not in found.scopes:
            raise Refusal(403, f"The key {found.name!r} has no scope {scope!r}.", code="scope_missing")
        return found

    return caller


def is_local(host: str) -> bool:
    """Whether a name or address can only mean the machine it is used on."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
