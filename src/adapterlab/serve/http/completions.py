"""`/v1/chat/completions`, `/v1/completions` and `/v1/models`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from adapterlab.errors import ConfigError
from adapterlab.serve.http.access import needs, service_of
from adapterlab.serve.http.faults import Refusal
from adapterlab.serve.http.keys import Caller
from adapterlab.serve.http.replies import ChatShape, Shape, TextShape
from adapterlab.serve.http.running import Running
from adapterlab.serve.http.schemas import ChatWish, TextWish, Wish
from adapterlab.serve.http.service import Service
from adapterlab.serve.http.tools import calls_in
from adapterlab.serve.requests import AdapterState
from adapterlab.serve.requests import Request as Job

router = APIRouter(prefix="/v1")
May = Annotated[Caller, Depends(needs("infer"))]
Here = Annotated[Service, Depends(service_of)]
GONE = 499  # what nginx writes down for a client that did not wait; nobody reads it


@router.post("/chat/completions")
async def chat(wish: ChatWish, request: Request, caller: May, service: Here) -> Response:
    """Answer a conversation."""
    service.check_open()
    state, name = await _adapter(service, wish, caller)
    template = await service.in_text_thread(service.template, state)

    def prompts() -> list[tuple[int, ...]]:
        return [service.prompts.chat(wish, template)]

    calls = partial(calls_in, service.prompts.tokenizer, template) if wish.offers_tools else None
    return await _answer(service, request, caller, wish, name, state, prompts, partial(ChatShape, calls=calls))


@router.post("/completions")
async def complete(wish: TextWish, request: Request, caller: May, service: Here) -> Response:
    """Continue texts."""
    service.check_open()
    state, name = await _adapter(service, wish, caller)

    def prompts() -> list[tuple[int, ...]]:
        return [service.prompts.text(prompt) for prompt in wish.prompts]

    return await _answer(service, request, caller, wish, name, state, prompts, TextShape)


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


async def _adapter(service: Service, wish: Wish, caller: Caller) -> tuple[AdapterState | None, str]:
    """Find the adapter that a request names, by `model` or by LoRAX's and TGI's `adapter_id`."""
    if wish.adapter_id and wish.model not in ("", service.base, wish.adapter_id):
        raise ConfigError(f"model {wish.model!r} and adapter_id {wish.adapter_id!r} name two adapters. Give one.")
    name = wish.adapter_id or wish.model or service.base
    return await service.call(service.adapter, name, caller.tenant), name


async def _answer(
    service: Service,
    request: Request,
    caller: Caller,
    wish: Wish,
    name: str,
    state: AdapterState | None,
    prompts: Callable[[], Sequence[tuple[int, ...]]],
    shape: Callable[..., Shape],
) -> Response:
    ids = await service.in_text_thread(prompts)
    _check_answers(service, len(ids) * wish.n)
    grammar = wish.response_format.grammar if wish.response_format else None
    processors = await service.in_text_thread(service.grammars.processors, grammar) if grammar is not None else None
    jobs = [
        Job(prompt, state and state.name, wish.sampling(_room(service, wish, len(prompt))), caller.tenant,
            processors=processors)
        for prompt in ids
    ]  # fmt: skip
    made = shape(name, service.prompts.one, wish.asked_logprobs is not None, len(jobs) * wish.n)
    running = Running(service, jobs, made, name)
    await running.start()
    headers = {"X-Without-Effect": ", ".join(wish.ignored)} if wish.ignored else {}
    if wish.stream:
        at_end = isinstance(wish, ChatWish) and wish.offers_tools
        pieces = running.pieces(wish.usage_in_stream, at_end=at_end)
        return Stream(running, pieces, headers)
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


def _check_answers(service: Service, answers: int) -> None:
    if not 1 <= answers <= service.limits.answers:
        raise Refusal(
            400, f"This asks for {answers} answers; 1 to {service.limits.answers} are given (limits.answers)."
        )


def _room(service: Service, wish: Wish, prompt: int) -> int:
    """The longest answer: what was asked for, or what is left of the window."""
    most, asked = service.limits.answer_tokens, wish.asked_tokens
    if asked is not None:
        if asked > most:
            raise Refusal(
                400,
                f"An answer has at most {most:,} tokens here (limits.answer_tokens); asked: {asked:,}.",
                param="max_tokens",
            )
        return asked
    return max(1, min(most, service.window - prompt if service.window is not None else most))


def _base(service: Service) -> dict[str, Any]:
    return {"id": service.base, "object": "model", "created": service.started, "owned_by": "adapterlab",
            "max_model_len": service.window}  # fmt: skip


def _model(service: Service, state: AdapterState) -> dict[str, Any]:
    return {"id": state.name, "object": "model", "created": service.started, "owned_by": state.tenant or "adapterlab",
            "parent": service.base, "max_model_len": service.window}  # fmt: skip
