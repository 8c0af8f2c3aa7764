"""`/generate` and `/generate_stream`, as TGI and LoRAX have them, and TGI's `/`, which is either of the two.

A request is put into our own terms, so that it means what it means everywhere else here; a response has their shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field, model_validator

from adapterlab.serve.http.access import needs, service_of
from adapterlab.serve.http.answering import Asked
from adapterlab.serve.http.bodies import body
from adapterlab.serve.http.faults import Refusal
from adapterlab.serve.http.keys import Caller
from adapterlab.serve.http.prompts import Prompts
from adapterlab.serve.http.replies import Gathered, Shape
from adapterlab.serve.http.schemas import ChatWish, JsonSchema, Message, ResponseFormat, Strict, TextWish
from adapterlab.serve.http.service import Service
from adapterlab.serve.requests import Finished, Token

router = APIRouter()
PATHS = ("/", "/generate", "/generate_stream")
May = Annotated[Caller, Depends(needs("infer"))]
Here = Annotated[Service, Depends(service_of)]


class Grammar(Strict):
    """TGI's form of an answer."""

    type: Literal["json", "json_schema"]
    value: dict[str, Any]

    @property
    def format(self) -> ResponseFormat:
        """The same in our terms."""
        named = self.type == "json_schema"
        return _keeping_to(self.value.get("schema", {}) if named else self.value)


class Format(Strict):
    """LoRAX's form of an answer."""

    type: Literal["json_object"]
    schema_: dict[str, Any] = Field({}, alias="schema")

    @property
    def format(self) -> ResponseFormat:
        """The same in our terms."""
        return _keeping_to(self.schema_)


def _keeping_to(schema: dict[str, Any]) -> ResponseFormat:
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=schema))


class Parameters(Strict):
    """How an answer is generated; those of LoRAX that TGI has not are `adapter_source` and below `truncate`."""

    adapter_id: str = Field("", max_length=512)
    adapter_source: Literal["local"] = "local"
    best_of: int = Field(1, ge=1)
    do_sample: bool = False
    temperature: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int | None = Field(None, ge=1)
    stop: list[str] = []
    return_full_text: bool = False
    details: bool = False
    decoder_input_details: Literal[False] = False
    watermark: Literal[False] = False
    top_n_tokens: int | None = Field(None, ge=1)
    grammar: Grammar | None = None
    truncate: int | None = Field(None, ge=1)
    ignore_eos_token: bool = False
    return_k_alternatives: int | None = Field(None, ge=1)
    apply_chat_template: bool = False
    response_format: Format | None = None

    @model_validator(mode="after")
    def _agreeing(self) -> Parameters:
        for one, other in (("top_n_tokens", "return_k_alternatives"), ("grammar", "response_format")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{one} is TGI's name for what LoRAX calls {other}: give one of them")
        if self.best_of > 1 and not self.samples:
            raise ValueError("best_of needs sampling, since greedy answers are all alike: set do_sample to true")
        return self

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn: only if something of the kind is asked for."""
        asked = self.do_sample or self.temperature not in (None, 1) or self.top_k or self.top_p not in (None, 1)
        return bool(asked) and self.temperature != 0

    @property
    def alternatives(self) -> int:
        """Likeliest tokens that are told beside each."""
        return self.top_n_tokens or self.return_k_alternatives or 0


class Translated(TextWish):
    """A request of this kind in our own terms; without `max_tokens` an answer is as long as there is room."""

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens


class GenerateWish(Strict):
    """A request of `/generate` and `/generate_stream`."""

    inputs: str = Field(min_length=1)
    parameters: Parameters = Parameters()

    def translated(self, *, stream: bool) -> Translated:
        """Put it into our own terms.

        Args:
            stream: answer token by token.

        Raises:
            Refusal: the best of several answers cannot be streamed.
        """
        p = self.parameters
        if stream and p.best_of > 1:
            raise Refusal(400, "best_of chooses among whole answers, which a stream has not. Ask /generate.")
        form = p.grammar or p.response_format
        return Translated(
            prompt=self.inputs, adapter_id=p.adapter_id, stream=stream, n=p.best_of, max_tokens=p.max_new_tokens,
            temperature=(p.temperature or 1.0) if p.samples else 0.0, top_k=p.top_k or 0, top_p=p.top_p or 1.0,
            repetition_penalty=p.repetition_penalty, seed=p.seed, stop=p.stop, ignore_eos=p.ignore_eos_token,
            response_format=form.format if form else None,
            logprobs=p.alternatives if stream or p.details or p.best_of > 1 else None,
        )  # fmt: skip


class EitherWish(GenerateWish):
    """A request of `/`."""

    stream: bool = False


@router.post("/generate")
async def generate(
    wish: Annotated[GenerateWish, Depends(body(GenerateWish, "infer"))], request: Request, caller: May, service: Here
) -> Response:
    """Continue a text."""
    return await _answered(wish, request, caller, service)


@router.post("/generate_stream")
async def generate_stream(
    wish: Annotated[GenerateWish, Depends(body(GenerateWish, "infer"))], request: Request, caller: May, service: Here
) -> Response:
    """Continue a text, token by token."""
    return await _answered(wish, request, caller, service, stream=True)


@router.post("/")
async def either(
    wish: Annotated[EitherWish, Depends(body(EitherWish, "infer"))], request: Request, caller: May, service: Here
) -> Response:
    """Continue a text, whole or token by token."""
    return await _answered(wish, request, caller, service, stream=wish.stream)


async def _answered(
    wish: GenerateWish, request: Request, caller: Caller, service: Service, *, stream: bool = False
) -> Response:
    asked = await Asked.of(service, caller, wish.translated(stream=stream))
    template = await service.in_text_thread(service.template, asked.state)
    prompt = await service.in_text_thread(_prompt, wish, service.prompts, template)
    return await asked.answered(request, [prompt], GenerateShape(wish, service.prompts))


def _prompt(wish: GenerateWish, prompts: Prompts, template: str | None) -> tuple[int, ...]:
    """Tokens of the text, or of a conversation that it is the first message of; the last ones where it is cut."""
    if wish.parameters.apply_chat_template:
        ids = prompts.chat(ChatWish(messages=[Message(role="user", content=wish.inputs)]), template)
    else:
        ids = prompts.text(wish.inputs)
    return ids[-wish.parameters.truncate :] if wish.parameters.truncate else ids


class GenerateShape(Shape):
    """Of `/generate` and `/generate_stream`.

    A stop text ends the text of an answer here, where OpenAI's shapes leave it out.
    """

    def __init__(self, wish: GenerateWish, prompts: Prompts):
        """Make the shape of one response.

        Args:
            wish: what was asked.
            prompts: for the texts of tokens.
        """
        self.asked, self.prompts = wish.parameters, prompts
        self.begin = wish.inputs if wish.parameters.return_full_text else ""
        self.keeps_tokens = True
        self._said, self._sent = "", 0

    def whole(self, answers: Sequence[Gathered], used: dict[str, Any]) -> dict[str, Any]:
        best = max(answers, key=_likelihood) if len(answers) > 1 else answers[0]
        made: dict[str, Any] = {"generated_text": self.begin + _text(best)}
        if self.asked.details:
            others = [self._sequence(one) for one in answers if one is not best]
            more = {"best_of_sequences": others} if others else {}
            made["details"] = {**self._details(best), "prompt_tokens": used["prompt_tokens"], **more}
        return made

    def may_send(self, part: Gathered) -> bool:
        return not part.tokens[-1].last

    def piece(self, part: Gathered) -> dict[str, Any]:
        self._sent += 1
        self._said += _text(part)
        token = self._token(part.tokens[-1], _text(part))
        made: dict[str, Any] = {"index": self._sent, "token": token, "generated_text": None, "details": None}
        if self.asked.top_n_tokens:
            made["top_tokens"] = self._top(part.tokens[-1])
        if part.end is not None:
            made["generated_text"] = self.begin + self._said
            prompt = part.end.prompt_tokens
            made["details"] = {**self._ended(part.end), "input_length": prompt, "prompt_tokens": prompt}
        return made

    def fault(self, refusal: Refusal) -> dict[str, Any]:
        return refusal.plain

    def _details(self, answer: Gathered) -> dict[str, Any]:
        assert answer.end is not None
        texts = [token.text for token in answer.tokens]
        texts[-1] += answer.end.text + _stop(answer.end)  # what was held back is shown with the last one
        tokens = [self._token(token, text) for token, text in zip(answer.tokens, texts, strict=True)]
        tops = {"top_tokens": [self._top(token) for token in answer.tokens]} if self.asked.top_n_tokens else {}
        return {**self._ended(answer.end), "prefill": [], "tokens": tokens, **tops}

    def _sequence(self, answer: Gathered) -> dict[str, Any]:
        return {"generated_text": self.begin + _text(answer), **self._details(answer)}

    def _ended(self, end: Finished) -> dict[str, Any]:
        return {"finish_reason": _reason(end), "generated_tokens": end.generated_tokens, "seed": self.asked.seed}

    def _token(self, token: Token, text: str) -> dict[str, Any]:
        special = self.prompts.is_special(token.id)
        made = {**self._named(token.id, token.logprob), "special": special}
        if not special:
            made["text"] = text  # in its place: half a character has none of its own
        if self.asked.return_k_alternatives:
            made["alternative_tokens"] = [self._named(id, value) for id, value in token.top]
        return made

    def _top(self, token: Token) -> list[dict[str, Any]]:
        return [{**self._named(id, value), "special": self.prompts.is_special(id)} for id, value in token.top]

    def _named(self, id: int, logprob: float | None) -> dict[str, Any]:
        return {"id": id, "text": self.prompts.one(id), "logprob": logprob}


def _text(answer: Gathered) -> str:
    return answer.text + _stop(answer.end)


def _stop(end: Finished | None) -> str:
    """The stop text that ended an answer, or ""."""
    return end.stopped_by if end is not None and isinstance(end.stopped_by, str) else ""


def _reason(end: Finished) -> str:
    if end.reason == "length":
        return "length"
    return "stop_sequence" if _stop(end) else "eos_token"


def _likelihood(answer: Gathered) -> float:
    """Mean log-probability of its tokens."""
    return sum(token.logprob or 0.0 for token in answer.tokens) / max(1, len(answer.tokens))
