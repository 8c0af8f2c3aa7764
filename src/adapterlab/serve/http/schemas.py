"""What a request may say: OpenAI's fields, and the few that servers of adapters add to them.

A field that is not listed is refused by name; null means that a field is not given.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapterlab.errors import nearest
from adapterlab.serve.http.tools import call_schema
from adapterlab.serve.requests import Sampling
from adapterlab.settings import SEEDS

_ID = re.compile(r"[0-9]{1,9}")
_COMPLETION_TOKENS = 16  # OpenAI's default for plain completions


class Strict(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = sorted(str(key) for key, value in given.items() if value is not None and key not in known)
        if unknown:
            hints = "\n".join(f"{key!r} is not known here. {nearest(key, known)}" for key in unknown[:8])
            raise ValueError(f"{hints}\nWhat this server does not do is refused, not ignored.")
        return {key: value for key, value in given.items() if value is not None}


class StreamOptions(Strict):
    """How answers are streamed."""

    include_usage: bool = False


class JsonSchema(Strict):
    """A schema that the answer shall fit."""

    name: str = "answer"
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("response_format has a json_schema exactly where its type is json_schema")
        return self

    @property
    def grammar(self) -> dict[str, Any] | None:
        """The schema to keep to, {} for any JSON, None for plain text."""
        return None if self.type == "text" else self.json_schema.schema_ if self.json_schema else {}


class Wish(Strict):
    """What both kinds of completions have in common.

    Attributes:
        labels: fields that change no answer; which of them came is said in a header of the response.
    """

    labels: ClassVar[tuple[str, ...]] = ("user", "metadata", "safety_identifier", "prompt_cache_key")

    model: str = Field("", max_length=512)
    adapter_id: str = Field("", max_length=512)
    max_tokens: int | None = None
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = {}
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Wish:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for streams: set stream to true, or leave them out")
        if not all(_ID.fullmatch(key) for key in self.logit_bias):
            raise ValueError("logit_bias goes from token ids, written as texts, to numbers")
        return self

    @property
    def answers(self) -> int:
        """How many are asked for."""
        return self.n

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with what was used."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def ignored(self) -> list[str]:
        """The fields that were given and change nothing."""
        return [name for name in self.labels if getattr(self, name) is not None]

    @property
    def grammar(self) -> dict[str, Any] | None:
        """The JSON schema that answers keep to, {} for any JSON, None for plain text."""
        return self.response_format.grammar if self.response_format else None

    @property
    def asked_tokens(self) -> int | None:
        """The longest answer that was asked for; None: as long as there is room."""
        return self.max_tokens

    @property
    def asked_logprobs(self) -> int | None:
        """How many likeliest tokens shall stand beside each chosen one; None: no log-probabilities."""
        return None

    def sampling(self, max_tokens: int) -> Sampling:
        """The engine's settings.

        Args:
            max_tokens: the longest answer, after all limits.

        Raises:
            ConfigError: a value is out of range.
        """
        return Sampling(
            max_tokens=max_tokens, n=self.n, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k,
            min_p=self.min_p, seed=None if self.seed is None else self.seed % SEEDS,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_ids=tuple(self.stop_token_ids), ignore_end=self.ignore_eos, logprobs=self.asked_logprobs,
            presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty, bias={int(key): b for key, b in self.logit_bias.items()},
        )  # fmt: skip


class TextWish(Wish):
    """A request of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else _COMPLETION_TOKENS

    @property
    def asked_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def answers(self) -> int:
        return self.n * len(self.prompts)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        given = self.prompt
        alone = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        return [given] if alone else list(given)  # type: ignore[list-item, arg-type]


class Part(Strict):
    """A part of a message; text alone is understood."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] = ""
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """The turn as chat templates read it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        rest = self.model_dump(exclude={"content"}, exclude_none=True)
        return {"role": rest.pop("role"), "content": content, **rest}


class Tool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: dict[str, Any]

    @model_validator(mode="after")
    def _named(self) -> Tool:
        if not isinstance(self.function.get("name"), str):
            raise ValueError("a tool is described by a function with a name")
        if not isinstance(self.function.get("parameters", {}), dict):
            raise ValueError("the parameters of a function are a JSON schema, an object")
        return self

    @property
    def name(self) -> str:
        """Of the function."""
        return str(self.function["name"])


class FunctionName(Strict):
    """Which function has to be called."""

    name: str


class NamedTool(Strict):
    """A choice of one tool."""

    type: Literal["function"]
    function: FunctionName


class ChatWish(Wish):
    """A request of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _agreeing(self) -> ChatWish:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens is the old name of max_completion_tokens: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @model_validator(mode="after")
    def _callable(self) -> ChatWish:
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice is for tools, and none are given: give tools, or leave it out")
        if isinstance(self.tool_choice, NamedTool) and not self.forced:
            named, there = self.tool_choice.function.name, [tool.name for tool in self.tools or ()]
            raise ValueError(f"tool_choice names {named!r}, which is none of the tools. {nearest(named, there)}")
        if self.forced and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("a call that is required leaves no room for a response_format: give one of them")
        return self

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def context(self) -> dict[str, Any]:
        """What the chat template gets besides the messages."""
        tools = {"tools": [tool.model_dump() for tool in self.tools or ()]} if self.offers_tools else {}
        return {**self.chat_template_kwargs, **tools}

    @property
    def offers_tools(self) -> bool:
        """Whether the model may call something."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def forced(self) -> list[Tool]:
        """The tools of which the answer must call one; none: it may say what it likes."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools or () if tool.name == self.tool_choice.function.name]
        return list(self.tools or ()) if self.tool_choice == "required" else []

    @property
    def grammar(self) -> dict[str, Any] | None:
        return call_schema([tool.function for tool in self.forced]) if self.forced else super().grammar


class LoadLora(Strict):
    """A request of vLLM's `/v1/load_lora_adapter`."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadLora(Strict):
    """A request of vLLM's `/v1/unload_lora_adapter`."""

    lora_name: str
    lora_int_id: int | None = None


class PutAdapter(Strict):
    """A request of `PUT /v1/adapters/NAME`.

    Attributes:
        path: of the adapter, below the server's folder; without it, the name is the path of a new adapter, and an
            adapter that is there already stays as it is.
        warm: load it now.
        pinned: keep it loaded; None: as it is.
    """

    path: str | None = Field(None, max_length=4096)
    warm: bool = False
    pinned: bool | None = None
