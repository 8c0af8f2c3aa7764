"""`/v1/chat/completions`, `/v1/completions` and `/v1/models`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from adapterlab.serve.http.access import needs, service_of
from adapterlab.serve.http.answering import Asked
from adapterlab.serve.http.bodies import body
from adapterlab.serve.http.keys import Caller
from adapterlab.serve.http.replies import ChatShape, Reader, TextShape
from adapterlab.serve.http.schemas import ChatWish, TextWish
from adapterlab.serve.http.service import Service
from adapterlab.serve.http.tools import calls_in, forced_call
from adapterlab.serve.requests import AdapterState

router = APIRouter(prefix="/v1")
May = Annotated[Caller, Depends(needs("infer"))]
Here = Annotated[Service, Depends(service_of)]
Chat = Annotated[ChatWish, Depends(body(ChatWish, "infer"))]
Text = Annotated[TextWish, Depends(body(TextWish, "infer"))]


@router.post("/chat/completions")
async def chat(wish: Chat, request: Request, caller: May, service: Here) -> Response:
    """Answer a conversation."""
    asked = await Asked.of(service, caller, wish)
    template = await service.in_text_thread(service.template, asked.state)
    prompt = await service.in_text_thread(service.prompts.chat, wish, template)
    shape = ChatShape(asked.name, service.prompts.one, wish, _reader(wish, service, template))
    return await asked.answered(request, [prompt], shape)


@router.post("/completions")
async def complete(wish: Text, request: Request, caller: May, service: Here) -> Response:
    """Continue texts."""
    asked = await Asked.of(service, caller, wish)
    prompts = [await service.in_text_thread(service.prompts.text, prompt) for prompt in wish.prompts]
    return await asked.answered(request, prompts, TextShape(asked.name, service.prompts.one, wish))


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


def _reader(wish: ChatWish, service: Service, template: str | None) -> Reader | None:
    """What takes calls of tools out of an answer; None where none may be in it."""
    if wish.forced:
        return forced_call
    return partial(calls_in, service.prompts.tokenizer, template) if wish.offers_tools else None


def _base(service: Service) -> dict[str, Any]:
    return {"id": service.base, "object": "model", "created": service.started, "owned_by": "adapterlab",
            "max_model_len": service.window}  # fmt: skip


def _model(service: Service, state: AdapterState) -> dict[str, Any]:
    return {"id": state.name, "object": "model", "created": service.started, "owned_by": state.tenant or "adapterlab",
            "parent": service.base, "max_model_len": service.window}  # fmt: skip
