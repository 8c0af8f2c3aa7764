"""`/v1/chat/completions`, `/v1/completions` and `/v1/models`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from adapterlab.errors import ConfigError
from adapterlab.serve.http.access import needs, service_of
from adapterlab.serve.http.faults import Refusal
from adapterlab.serve.http.grammar import Processors
from adapterlab.serve.http.keys import Caller
from adapterlab.serve.http.replies import ChatShape, Shape, TextShape
from adapterlab.serve.http.running import Running
from adapterlab.serve.http.schemas import ChatWish, TextWish, Wish
from adapterlab.serve.http.service import Service
from adapterlab.serve.http.shelf import TENANT
from adapterlab.serve.http.tools import calls_in
from adapterlab.serve.requests import AdapterState
from adapterlab.serve.requests import Request as Job

router = APIRouter(prefix="/v1")
May = Annotated[Caller, Depends(needs("infer"))]
Here = Annotated[Service, Depends(service_of)]
GONE = 499  # what nginx writes down for a client that did not wait; nobody reads it


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

    @property
    def label(self) -> str:
        """The name in metrics, where adapters of all tenants stand."""
        tenant = self.state.tenant if self.state is not None else None
        return self.name if tenant is None else f"{TENANT}{tenant}/{self.name}"

    def jobs(self, prompts: Sequence[tuple[int, ...]], processors: Processors | None) -> list[Job]:
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


@router.post("/chat/completions")
async def chat(wish: ChatWish, request: Request, caller: May, service: Here) -> Response:
    """Answer a conversation."""
    asked = await _asked(service, caller, wish)
    template = await service.in_text_thread(service.template, asked.state)
    prompt = await service.in_text_thread(service.prompts.chat, wish, template)
    calls = partial(calls_in, service.prompts.tokenizer, template) if wish.offers_tools else None
    return await _answer(request, asked, [prompt], partial(ChatShape, calls=calls), at_end=wish.offers_tools)


@router.post("/completions")
async def complete(wish: TextWish, request: Request, caller: May, service: Here) -> Response:
    """Continue texts."""
    asked = await _asked(service, caller, wish)
    prompts = [await service.in_text_thread(service.prompts.text, prompt) for prompt in wish.prompts]
    return await _answer(request, asked, prompts, TextShape)


@router.get("/models")
async def models(caller: May, service: Here) -> dict[str, Any]:
    """List the base and the adapters that the caller sees."""
    states = await service.call(service.engine.adapters, caller.tenant)
    return {"object": "list", "data": [_base(service), *(_model(service, state) for state in states)]}


@router.get("/models/{name:path}")
async def model(name: str, caller: May, service: Here) -> dict[str, Any]:
    """Describe one of them."""
    state = await service.call(service.adapter, name, caller.tenant)
    return _base(service) if state is None else _model(service, state)


async def _asked(service: Service, caller: Caller, wish: Wish) -> Asked:
    """Find what a request names, by `model` or by LoRAX's and TGI's `adapter_id`."""
    service.check_open()
    if not 1 <= wish.answers <= service.limits.answers:
        most = service.limits.answers
        raise Refusal(400, f"This asks for {wish.answers} answers; 1 to {most} are given (limits.answers).")
    if wish.adapter_id and wish.model not in ("", service.base, wish.adapter_id):
        raise ConfigError(f"model {wish.model!r} and adapter_id {wish.adapter_id!r} name two adapters. Give one.")
    name = wish.adapter_id or wish.model or service.base
    return Asked(service, caller, wish, await service.call(service.adapter, name, caller.tenant), name)


async def _answer(
    request: Request,
    asked: Asked,
    prompts: Sequence[tuple[int, ...]],
    shape: Callable[..., Shape],
    *,
    at_end: bool = False,
) -> Response:
    service, wish = asked.service, asked.wish
    grammar = wish.response_format.grammar if wish.response_format else None
    processors = await service.in_text_thread(service.grammars.processors, grammar) if grammar is not None else None
    made = shape(asked.name, service.prompts.one, wish.asked_logprobs is not None, wish.answers)
    running = Running(service, asked.jobs(prompts, processors), made, asked.label)
    await running.start()
    headers = {"X-Without-Effect": ", ".join(wish.ignored)} if wish.ignored else {}
    if wish.stream:
        return Stream(running, running.pieces(wish.usage_in_stream, at_end=at_end), headers)
    found = await _unless_gone(request, running)
    return Response(status_code=GONE) if found is None else JSONResponse(found, headers=headers)


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


async def _unless_gone(request: Request, running: Running) -> dict[str, Any] | None:
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


def _base(service: Service) -> dict[str, Any]:
    return {"id": service.base, "object": "model", "created": service.started, "owned_by": "adapterlab",
            "max_model_len": service.window}  # fmt: skip


def _model(service: Service, state: AdapterState) -> dict[str, Any]:
    return {"id": state.name, "object": "model", "created": service.started, "owned_by": state.tenant or "adapterlab",
            "parent": service.base, "max_model_len": service.window}  # fmt: skip
