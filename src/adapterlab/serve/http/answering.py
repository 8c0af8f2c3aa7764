"""From a request that is understood to its response, whole or as a stream; all routes that generate go this way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from adapterlab.errors import ConfigError
from adapterlab.serve.http.faults import GONE, Refusal
from adapterlab.serve.http.grammar import Processors
from adapterlab.serve.http.keys import Caller
from adapterlab.serve.http.replies import Shape
from adapterlab.serve.http.running import Running
from adapterlab.serve.http.schemas import Wish
from adapterlab.serve.http.service import Service
from adapterlab.serve.http.shelf import labelled
from adapterlab.serve.requests import AdapterState
from adapterlab.serve.requests import Request as Job


@dataclass(frozen=True)
class Asked:
    """A request and what it names.

    Attributes:
        service: that it came to.
        caller: who asks.
        wish: what for.
        state: of the adapter; None: the base.
        name: of the adapter or the base, as asked for.
    """

    service: Service
    caller: Caller
    wish: Wish
    state: AdapterState | None
    name: str

    @classmethod
    async def of(cls, service: Service, caller: Caller, wish: Wish) -> Asked:
        """Find what a request names, by `model` or by LoRAX's and TGI's `adapter_id`.

        Raises:
            Refusal: the server takes no requests now, or not so many answers at once.
            ConfigError: two adapters are named.
            UnknownAdapterError: there is none of this name.
        """
        service.check_open()
        if not 1 <= wish.answers <= service.limits.answers:
            most = service.limits.answers
            raise Refusal(400, f"This asks for {wish.answers} answers; 1 to {most} are given (limits.answers).")
        if wish.adapter_id and wish.model not in ("", service.base, wish.adapter_id):
            raise ConfigError(f"model {wish.model!r} and adapter_id {wish.adapter_id!r} name two adapters. Give one.")
        name = wish.adapter_id or wish.model or service.base
        return cls(service, caller, wish, await service.call(service.adapter, name, caller.tenant), name)

    async def answered(self, request: Request, prompts: Sequence[tuple[int, ...]], shape: Shape) -> Response:
        """Let the engine answer.

        Args:
            request: whose client waits.
            prompts: tokens of each.
            shape: of the response.

        Raises:
            AdapterlabError, Refusal: why there is no answer.
        """
        grammar, grammars = self.wish.grammar, self.service.grammars
        processors = await self.service.in_text_thread(grammars.processors, grammar) if grammar is not None else None
        running = Running(self.service, self._jobs(prompts, processors), shape, self._label)
        await running.start()
        headers = {"X-Without-Effect": ", ".join(self.wish.ignored)} if self.wish.ignored else {}
        if self.wish.stream:
            return Stream(running, running.pieces(), headers)
        found = await _unless_gone(request, running)
        return Response(status_code=GONE) if found is None else JSONResponse(found, headers=headers)

    @property
    def _label(self) -> str:
        """The name in metrics, where adapters of all tenants stand."""
        return self.name if self.state is None else labelled(self.state.name, self.state.tenant)

    def _jobs(self, prompts: Sequence[tuple[int, ...]], processors: Processors | None) -> list[Job]:
        """The engine's requests, one for each prompt."""
        adapter = self.state.name if self.state is not None else None
        return [
            Job(prompt, adapter, self.wish.sampling(self._room(len(prompt))), self.caller.tenant, processors=processors)
            for prompt in prompts
        ]

    def _room(self, prompt: int) -> int:
        """The longest answer: what was asked for, or what is left of the window."""
        most, asked, window = self.service.limits.answer_tokens, self.wish.asked_tokens, self.service.window
        if asked is None:
            return max(1, min(most, window - prompt if window is not None else most))
        if asked > most:
            said = f"An answer has at most {most:,} tokens here (limits.answer_tokens); asked: {asked:,}."
            raise Refusal(400, said, param="max_tokens")
        return asked


class Stream(StreamingResponse):
    """Server-sent events; the engine stops when they are not sent any more, also before the first one."""

    def __init__(self, running: Running, pieces: AsyncIterator[str], headers: dict[str, str]):
        super().__init__(pieces, media_type="text/event-stream", headers={**headers, "Cache-Control": "no-cache"})
        self.running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.running.close()


async def _unless_gone(request: Request, running: Running) -> Any:
    """Wait for a response; None, with everything cancelled, when the client has gone meanwhile."""
    answering, leaving = asyncio.ensure_future(running.whole()), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        running.close()
        for task in (answering, leaving):
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
