"""One HTTP request in the engine: its events reach the event loop, and it is cancelled when nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from adapterlab.errors import ServingError
from adapterlab.serve.http.faults import Refusal, unavailable
from adapterlab.serve.http.replies import Gathered, Shape, usage
from adapterlab.serve.http.service import Service
from adapterlab.serve.requests import Event, Finished, Handle, Request

_QUIET = 10.0  # seconds without an event after which a stream shows that it is alive
_ALIVE = ": waiting\n\n"


class Running:
    """Requests of the engine, one for each prompt, that make up one response.

    What waits here for a slow client is bounded by the longest answer; the engine waits for nobody.
    """

    def __init__(self, service: Service, requests: Sequence[Request], shape: Shape, adapter: str):
        self.service, self.requests, self.shape, self.adapter = service, requests, shape, adapter
        self.each = requests[0].sampling.n
        self._ends: dict[int, Finished] = {}
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._handles: list[Handle] = []
        self._closed = False
        self._begun = time.monotonic()
        self._last: dict[int, float] = {}

    async def start(self) -> None:
        """Submit all requests.

        Raises:
            AdapterlabError: one is refused; then none runs.
        """
        try:
            await self.service.call(self._submit, asyncio.get_running_loop())
        except BaseException:  # the client may be gone meanwhile
            self.close()
            raise

    def _submit(self, loop: asyncio.AbstractEventLoop) -> None:
        for i, request in enumerate(self.requests):
            handle = self.service.engine.submit(request, partial(self._pass, loop, i))
            self._handles.append(handle)
            if self._closed:
                handle.cancel()

    def _pass(self, loop: asyncio.AbstractEventLoop, i: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(self._events.put_nowait, (i, event))

    def close(self) -> None:
        """Cancel what has not ended."""
        if not self._closed and (left := self.each * len(self.requests) - len(self._ends)):
            self.service.metrics.answers.labels(self.adapter, "cancelled").inc(left)
        self._closed = True
        for handle in self._handles:
            handle.cancel()

    async def whole(self) -> Any:
        """Wait for all answers.

        Returns:
            The response.

        Raises:
            Refusal: an answer ended with an error, or took too long.
        """
        answers = self._empty()
        try:
            async for index, event in self._arrivals():
                if event is not None:
                    self._add(answers[index], event)
        finally:
            self.close()
        return self.shape.whole(answers, self._usage())

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the response as server-sent events; whoever sends them closes."""
        shape, parts = self.shape, self._empty()
        try:
            for part in parts:
                for opening in shape.opening(part.index):
                    yield _event(opening)
            async for index, event in self._arrivals():
                if event is None:
                    yield _ALIVE
                    continue
                part = self._add(parts[index], event)
                if part.end is not None or shape.may_send(part):
                    yield _event(shape.piece(part))
                    parts[index] = Gathered(index)
            for closing in shape.closing(self._usage()):
                yield _event(closing)
        except Refusal as refusal:  # the status is sent already
            yield _event(shape.fault(refusal))

    def _empty(self) -> list[Gathered]:
        return [Gathered(i) for i in range(self.each * len(self.requests))]

    async def _arrivals(self) -> AsyncIterator[tuple[int, Event | None]]:
        """Yield events with the index of their answer, and None now and then while nothing comes."""
        until = self._begun + self.service.limits.seconds
        while len(self._ends) < self.each * len(self.requests):
            try:
                left = until - time.monotonic()
                i, event = await asyncio.wait_for(self._events.get(), max(0.001, min(_QUIET, left)))
            except TimeoutError:
                if time.monotonic() >= until:
                    raise self._late() from None
                yield -1, None
                continue
            index = i * self.each + event.index
            self._measure(index, event)
            if isinstance(event, Finished):
                self._ends[index] = event
                self._check(event)
            yield index, event

    def _late(self) -> Refusal:
        return Refusal(
            504, f"This took longer than {self.service.limits.seconds:g} s (limits.seconds).", code="timeout"
        )

    def _measure(self, index: int, event: Event) -> None:
        metrics, now = self.service.metrics, time.monotonic()
        if isinstance(event, Finished):
            metrics.ended(self.adapter, event)
            return
        (metrics.between if index in self._last else metrics.first).observe(now - self._last.get(index, self._begun))
        self._last[index] = now

    def _check(self, end: Finished) -> None:
        """Raise what ended an answer, unless it ended by itself."""
        if end.reason == "cancelled":
            raise unavailable("The server stopped before this was answered. Ask once more.")
        if end.reason == "error":
            raise self.service.refusal(end.error or ServingError("The engine gave no answer and no reason."))

    def _add(self, answer: Gathered, event: Event) -> Gathered:
        answer.text += event.text
        if isinstance(event, Finished):
            answer.end = event
        elif self.shape.keeps_tokens:
            answer.tokens.append(event)
        return answer

    def _usage(self) -> dict[str, Any]:
        ends = [self._ends[index] for index in sorted(self._ends)]
        return usage(ends[:: self.each], ends)


def _event(data: dict[str, Any] | str) -> str:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n"
