"""Answers in the shapes of OpenAI's API, whole and in pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterlab.serve.requests import Finished, Token

Decode = Callable[[int], str]  # the text of one token


@dataclass
class Gathered:
    """An answer, or a piece of one, as far as it came.

    Attributes:
        index: of the choice.
        text: so far.
        tokens: so far; kept where log-probabilities were asked for.
        end: its last event.
    """

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    end: Finished | None = None


@dataclass(frozen=True)
class Head:
    """What all pieces of a response begin with."""

    id: str
    object: str
    created: int
    model: str

    def written(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A response, or a piece of one."""
        return {
            "id": self.id, "object": self.object, "created": self.created, "model": self.model,
            "choices": list(choices), **more,
        }  # fmt: skip


class Shape:
    """How one of the two kinds of completions writes its choices.

    Attributes:
        whole, piece: names of the objects.
    """

    whole = piece = prefix = ""

    def __init__(self, model: str, decode: Decode, logprobs: bool, answers: int):
        self.decode, self.logprobs, self.answers = decode, logprobs, answers
        self._id, self._created, self._model = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time()), model

    def head(self, *, stream: bool) -> Head:
        """Return the head of a response."""
        return Head(self._id, self.piece if stream else self.whole, self._created, self._model)

    def choice(self, answer: Gathered) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def opening(self, index: int) -> dict[str, Any] | None:
        """The piece before all text, or None."""
        return None

    def delta(self, piece: Gathered) -> dict[str, Any]:
        """A piece of an answer."""
        raise NotImplementedError

    def _logprobs(self, answer: Gathered) -> dict[str, Any] | None:
        raise NotImplementedError

    def _end(self, answer: Gathered) -> dict[str, Any]:
        logprobs = self._logprobs(answer) if self.logprobs else None
        return {"index": answer.index, "logprobs": logprobs, "finish_reason": answer.end and answer.end.reason}


class TextShape(Shape):
    """Of `/v1/completions`."""

    whole = piece = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, decode: Decode, logprobs: bool, answers: int):
        super().__init__(model, decode, logprobs, answers)
        self._offsets = [0] * answers

    def choice(self, answer: Gathered) -> dict[str, Any]:
        return {"text": answer.text, **self._end(answer)}

    def delta(self, piece: Gathered) -> dict[str, Any]:
        return self.choice(piece)

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


class ChatShape(Shape):
    """Of `/v1/chat/completions`."""

    whole, piece, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, *args: Any, calls: Callable[[str], tuple[str, list[dict[str, Any]]]] | None = None):
        """Make the shape.

        Args:
            args: as of `Shape`.
            calls: takes the calls of tools out of a text; None where no tools were offered.
        """
        super().__init__(*args)
        self.calls = calls

    def choice(self, answer: Gathered) -> dict[str, Any]:
        text, calls = self.calls(answer.text) if self.calls else (answer.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        ended = self._end(answer)
        if calls:
            message["tool_calls"], ended["finish_reason"] = calls, "tool_calls"
        return {"message": message, **ended}

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"delta": delta, "index": index, "logprobs": None, "finish_reason": None}

    def delta(self, piece: Gathered) -> dict[str, Any]:
        text, calls = self.calls(piece.text) if self.calls else (piece.text, [])
        ended = self._end(piece)
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
