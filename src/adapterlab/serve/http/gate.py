"""Around all routes: the size of bodies, the time of requests, one line in the log for each."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterlab.serve.http.faults import Refusal
from adapterlab.serve.http.limits import Limits

log = logging.getLogger("adapterlab.serve")
_GRACE = 5.0  # seconds that an answer which took its time to the full gets to say so


class Gate:
    """Refuses bodies that are too large and ends what takes too long, a client that reads slowly included.

    What is logged are method, path, status and time: nothing of what was asked or answered.
    """

    def __init__(self, app: ASGIApp, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        deadline = asyncio.timeout(self.limits.seconds + _GRACE)
        try:
            async with deadline:
                await self.app(scope, self._bounded(receive), noted)
        except Exception as error:
            refusal = self._late() if deadline.expired() else _unforeseen(error)
            if not status:  # an answer that has begun breaks off: the connection is closed
                await JSONResponse(refusal.body, refusal.status)(scope, receive, noted)
        finally:
            log.info("%s %s %d %.2f s", scope["method"], scope["path"], status, time.monotonic() - begun)

    def _late(self) -> Refusal:
        return Refusal(504, f"This took longer than {self.limits.seconds:g} s (limits.seconds).", code="timeout")

    def _bounded(self, receive: Receive) -> Receive:
        most, come = self.limits.body_bytes, 0

        async def bounded() -> Message:
            nonlocal come
            message = await receive()
            come += len(message.get("body", b""))
            if come > most:
                raise Refusal(413, f"The body is larger than {most:,} bytes (limits.body_bytes).")
            return message

        return bounded


def _unforeseen(error: Exception) -> Refusal:
    """What such an error says may hold a part of what was asked, so its kind and place alone are logged and told."""
    if isinstance(error, RecursionError):
        return Refusal(400, "This is nested too deeply.")
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-6:]))
    log.error("%s was not foreseen, at %s", type(error).__name__, places)
    return Refusal(500, f"Something went wrong here ({type(error).__name__}).", code="internal")
