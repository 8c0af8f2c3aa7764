"""Answers in the shapes of OpenAI's API, whole and in pieces, and what a shape is."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterlab.serve.http.faults import Refusal
from adapterlab.serve.http.schemas import Wish
from adapterlab.serve.requests import Finished, Token

Decode = Callable[[int], str]  # the text of one token
Reader = Callable[[str], tuple[str, list[dict[str, Any]]]]  # a text without its calls of tools, and the calls


@dataclass
class Gathered:
    """An answer, or a piece of one, as far as it came.

    Attributes:
        index: of the choice.
        text: so far.
        tokens: so far; kept where the shape tells of them.
        end: its last event.
    """

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    end: Finished | None = None


@dataclass(frozen=True)
class Head:
    """What all pieces of a response begin with."""

    object: str
    id: str
    created: int
    model: str

    def written(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A response, or a piece of one."""
        return {
            "id": self.id, "object": self.object, "created": self.created, "model": self.model,
            "choices": list(choices), **more,
        }  # fmt: skip


class Shape:
    """How a kind of response is written, whole and in pieces.

    Attributes:
        keeps_tokens: it tells of single tokens, not of texts alone.
    """

    keeps_tokens = False

    def whole(self, answers: Sequence[Gathered], used: dict[str, Any]) -> Any:
        """Write a response.

        Args:
            answers: all of them, by index.
            used: tokens, as `usage` counts them.
        """
        raise NotImplementedError

    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        """Write what a stream begins an answer with, before there is a text."""
        return ()

    def may_send(self, part: Gathered) -> bool:
        """Whether a part of an answer that goes on can be sent; its end always can."""
        raise NotImplementedError

    def piece(self, part: Gathered) -> dict[str, Any]:
        """Write a part of an answer; each part once, in order."""
        raise NotImplementedError

    def closing(self, used: dict[str, Any]) -> Iterable[dict[str, Any] | str]:
        """Write what a stream ends with."""
        return ()

    def fault(self, refusal: Refusal) -> dict[str, Any]:
        """Write an error into a stream."""
        raise NotImplementedError


class Completion(Shape):
    """OpenAI's shapes: choices under a head.

    Attributes:
        whole_object, piece_object: their names.
        prefix: of ids.
    """

    whole_object = piece_object = prefix = ""

    def __init__(self, model: str, decode: Decode, wish: Wish):
        """Make the shape of one response.

        Args:
            model: as asked for.
            decode: the text of one token.
            wish: what was asked.
        """
        self.decode, self.with_usage = decode, wish.usage_in_stream
        self.keeps_tokens = wish.asked_logprobs is not None
        head = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time()), model
        self._whole, self._piece = (Head(kind, *head) for kind in (self.whole_object, self.piece_object))

    def choice(self, answer: Gathered) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def delta(self, part: Gathered) -> dict[str, Any]:
        """A part of an answer."""
        raise NotImplementedError

    def whole(self, answers: Sequence[Gathered], used: dict[str, Any]) -> dict[str, Any]:
        return self._whole.written([self.choice(answer) for answer in answers], usage=used)

    def may_send(self, part: Gathered) -> bool:
        return bool(part.text)

    def piece(self, part: Gathered) -> dict[str, Any]:
        return self._in_stream(self.delta(part))

    def closing(self, used: dict[str, Any]) -> Iterable[dict[str, Any] | str]:
        if self.with_usage:
            yield self._piece.written([], usage=used)
        yield "[DONE]"

    def fault(self, refusal: Refusal) -> dict[str, Any]:
        return refusal.body

    def _in_stream(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._piece.written([choice], **({"usage": None} if self.with_usage else {}))

    def _logprobs(self, answer: Gathered) -> dict[str, Any] | None:
        raise NotImplementedError

    def _end(self, answer: Gathered) -> dict[str, Any]:
        logprobs = self._logprobs(answer) if self.keeps_tokens else None
        return {"index": answer.index, "logprobs": logprobs, "finish_reason": answer.end and answer.end.reason}


class TextShape(Completion):
    """Of `/v1/completions`."""

    whole_object = piece_object = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, decode: Decode, wish: Wish):
        super().__init__(model, decode, wish)
        self._offsets = [0] * wish.answers

    def choice(self, answer: Gathered) -> dict[str, Any]:
        return {"text": answer.text, **self._end(answer)}

    def delta(self, part: Gathered) -> dict[str, Any]:
        return self.choice(part)

    def _logprobs(self, answer: Gathered) -> dict[str, Any]:
        texts, offsets = [self.decode(token.id) for token in answer.tokens], []
        for text in texts:
            offsets.append(self._offsets[answer.index])
            self._offsets[answer.index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in answer.tokens],
            "top_logprobs": [{self.decode(id): value for id, value in token.top} for token in answer.tokens],
            "text_offset": offsets,
        }


class ChatShape(Completion):
    """Of `/v1/chat/completions`."""

    whole_object, piece_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str, decode: Decode, wish: Wish, calls: Reader | None):
        """Make the shape of one response.

        Args:
            model: as asked for.
            decode: the text of one token.
            wish: what was asked.
            calls: takes the calls of tools out of a text; None where no tools were offered.
        """
        super().__init__(model, decode, wish)
        self.calls = calls

    def choice(self, answer: Gathered) -> dict[str, Any]:
        text, calls = self.calls(answer.text) if self.calls else (answer.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        ended = self._end(answer)
        if calls:
            message["tool_calls"], ended["finish_reason"] = calls, "tool_calls"
        return {"message": message, **ended}

    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        yield self._in_stream({"delta": delta, "index": index, "logprobs": None, "finish_reason": None})

    def may_send(self, part: Gathered) -> bool:
        return bool(part.text) and self.calls is None  # a call is read when it is complete

    def delta(self, part: Gathered) -> dict[str, Any]:
        text, calls = self.calls(part.text) if self.calls else (part.text, [])
        ended = self._end(part)
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
            ended["finish_reason"] = "tool_calls"
        return {"delta": delta, **ended}

    def _logprobs(self, answer: Gathered) -> dict[str, Any]:
        return {"content": [self._token(token) for token in answer.tokens], "refusal": None}

    def _token(self, token: Token) -> dict[str, Any]:
        top = [self._one(id, value) for id, value in token.top]
        return {**self._one(token.id, token.logprob), "top_logprobs": top}

    def _one(self, id: int, logprob: float | None) -> dict[str, Any]:
        text = self.decode(id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


def usage(prompts: Iterable[Finished], ends: Iterable[Finished]) -> dict[str, Any]:
    """Count the tokens of a response.

    Args:
        prompts: one end for each prompt, whose answers share it.
        ends: of all answers.
    """
    asked = list(prompts)
    sent, made = sum(end.prompt_tokens for end in asked), sum(end.generated_tokens for end in ends)
    return {
        "prompt_tokens": sent,
        "completion_tokens": made,
        "total_tokens": sent + made,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in asked)},
    }
