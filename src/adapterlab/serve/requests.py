"""What goes into the engine and what comes out of it: plain data, without torch.

A request names tokens, an adapter and how to choose; the engine answers with a `Handle`, from which one event comes for
each token and one for the end of each answer. Errors of the request itself are raised by `Engine.submit`; what goes
wrong later comes as a `Finished` with the error.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from adapterlab.errors import AdapterlabError, ServingError
from adapterlab.settings import SEEDS, Settings

PROMPT_TOKENS = 8  # of a prompt, for which it is worth to begin a piece
Reason = Literal["stop", "length", "cancelled", "error"]


class Sampling(Settings):
    """How the next token is chosen; without settings, by sampling from the whole distribution, as OpenAI's API has it.

    Penalties and filters are applied in this order: repetition, presence and frequency, bias, temperature, top-k,
    min-p, top-p. Log-probabilities are those of the model before all of them.
    """

    max_tokens: int = Field(16, ge=1, description="the longest answer, in tokens")
    temperature: float = Field(1.0, ge=0, le=100, description="0 takes the likeliest token")
    top_k: int = Field(0, ge=0, description="choose among so many of the likeliest tokens; 0: among all")
    top_p: float = Field(1.0, gt=0, le=1, description="choose from the smallest set of tokens with this probability")
    min_p: float = Field(0.0, ge=0, le=1, description="leave out tokens less likely than this share of the likeliest")
    seed: int | None = Field(None, ge=0, lt=SEEDS, description="the same seed gives the same answer; default: drawn")
    n: int = Field(1, ge=1, le=64, description="answers to give; each has a random stream of its own")
    stop: tuple[str, ...] = Field((), max_length=16, description="texts that end an answer and are not part of it")
    stop_ids: tuple[int, ...] = Field(
        (), max_length=64, description="tokens that end an answer, beside the model's own"
    )
    ignore_end: bool = Field(False, description="do not stop at the model's own end tokens")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="log-probabilities of the chosen token and of so many of the likeliest"
    )
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="divides the logits of tokens that occurred")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="taken from the logits of tokens that were generated")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="likewise, once for each time they were")
    bias: dict[int, float] = Field({}, max_length=1024, description="added to the logits of tokens, by id")


@dataclass(frozen=True)
class Request:
    """What is asked of the engine.

    Attributes:
        prompt: token ids, one or more.
        adapter: the name it is registered under, or None for the base.
        sampling: see `Sampling`.
        tenant: who asks; sees the adapters of its own and those of nobody, shares cached prefixes with no other, and
            gets a fair share beside other tenants. None is a tenant too: the one without a name.
        priority: requests of a higher one are admitted before all others, until those have waited `patience` seconds.
        processors: makes a list of transformers' logits processors for one answer, called as
            `processor(ids [1, tokens], logits [1, vocabulary])` after penalties and before temperature; for constrained
            decoding. It is called once for each answer when the request is submitted. A processor is not trusted: its
            error ends that answer alone.
    """

    prompt: tuple[int, ...]
    adapter: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    tenant: str | None = None
    priority: int = 0
    processors: Callable[[], list[Any]] | None = None


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        index: of the answer, 0 to n - 1.
        id: of the token.
        text: what it adds to the text; held back while it may be the beginning of a stop text or of a character, and ""
            without a tokenizer.
        logprob: natural logarithm of its probability under the model, or None if none were asked for.
        top: the likeliest tokens with theirs, the likeliest first.
        last: the answer ends with it.
    """

    index: int
    id: int
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    last: bool = False


@dataclass(frozen=True)
class Finished:
    """The end of one answer; the last event of its index.

    Attributes:
        index: of the answer.
        reason: `stop` (an end token or a stop text), `length`, `cancelled`, or `error`.
        text: what was held back and belongs to the answer after all.
        stopped_by: the stop text, or the id of the token that ended it; None for others.
        error: what went wrong, for `error`.
        prompt_tokens: of the request.
        cached_tokens: of the prompt, those whose keys and values were there already.
        generated_tokens: of this answer, an end token included.
    """

    index: int
    reason: Reason
    text: str = ""
    stopped_by: str | int | None = None
    error: AdapterlabError | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


Event = Token | Finished


@dataclass
class Answer:
    """An answer, whole: what `Handle.result` makes of the events."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    end: Finished | None = None

    @property
    def ids(self) -> list[int]:
        """The generated tokens, an end token included."""
        return [token.id for token in self.tokens]


class Handle:
    """A submitted request: an iterator over its events, which may be read by one thread.

    Attributes:
        id: of the request, unique in the engine.
        request: as submitted.
        submitted: `time.monotonic()` when it was.
    """

    def __init__(self, id: str, request: Request, on_event: Callable[[Event], None] | None = None):
        self.id, self.request, self.submitted = id, request, time.monotonic()
        self.cancelled = False
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._on_event = on_event
        self._open = request.sampling.n

    def cancel(self) -> None:
        """Stop it: before the next step its pages and its reference to the adapter are given back.

        May be called from any thread, any number of times, also after the end. The answers that were not finished end
        with the reason `cancelled`.
        """
        self.cancelled = True

    def put(self, event: Event) -> None:
        """Hand on an event; called by the engine's thread alone."""
        if self._on_event is None:
            self._events.put(event)
            return
        try:
            self._on_event(event)
        except Exception:  # whoever listened is gone
            self.cancel()

    def __iter__(self) -> Iterator[Event]:
        """Yield events until all answers are finished."""
        while (event := self.next_event()) is not None:
            yield event

    def next_event(self, timeout: float | None = None) -> Event | None:
        """Wait for the next event; None when all answers are finished.

        Raises:
            ServingError: nothing came in `timeout` seconds. The request goes on.
        """
        if not self._open:
            return None
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            raise ServingError(
                f"Request {self.id} gave nothing for {timeout:g} seconds. Wait on, or cancel it."
            ) from None
        self._open -= isinstance(event, Finished)
        return event

    def result(self, timeout: float | None = None) -> list[Answer]:
        """Wait for all answers and return them, by index.

        Args:
            timeout: seconds to wait for each event.

        Raises:
            AdapterlabError: what ended an answer with `error`.
            ServingError: nothing came in `timeout` seconds.
        """
        answers = [Answer() for _ in range(self.request.sampling.n)]
        while (event := self.next_event(timeout)) is not None:
            answer = answers[event.index]
            answer.text += event.text
            if isinstance(event, Token):
                answer.tokens.append(event)
                continue
            if event.error is not None:
                raise event.error
            answer.end = event
        return answers


@dataclass(frozen=True)
class AdapterState:
    """An adapter as the engine knows it.

    Attributes:
        name: under which requests name it.
        tenant: whose it is; None: everybody's.
        version: 1, and one more each time its name is registered again.
        folder: where it is read from.
        method: id of its method.
        form: how it is computed: `tokens` beside others in a step, `pages` as keys and values that are shared, `alone`
            in steps of its own; None until it was loaded once.
        state: `registered` (on disk), `loaded`, or `quarantined`.
        reason: why it is quarantined, or "".
        pinned: it is never unloaded.
        running: requests that use this version now.
        waiting: requests that will.
        bytes: that it takes when loaded.
    """

    name: str
    tenant: str | None
    version: int
    folder: str
    method: str
    form: Literal["tokens", "pages", "alone"] | None = None
    state: Literal["registered", "loaded", "quarantined"] = "registered"
    reason: str = ""
    pinned: bool = False
    running: int = 0
    waiting: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Statistics:
    """Counts since the start, and what is there now. Taken between steps, so that they fit together.

    Attributes:
        steps: forward passes.
        tokens_in: tokens of prompts that were computed.
        tokens_cached: tokens of prompts whose keys and values were there already.
        tokens_out: tokens generated.
        finished: answers by the reason of their end.
        preempted: how often an answer gave its pages back and was computed again later.
        loads: adapters read from disk.
        unloads: adapters that made room.
        by_adapter: tokens generated by the name of the adapter; "" is the base.
        running: answers that have pages.
        waiting: answers that have none.
        pages: all there are.
        pages_used: of running answers and of loaded adapters.
        pages_cached: kept for prefixes that come again; they are free for whoever needs them.
        bytes_budget: for pages and adapters together.
        bytes_adapters: of loaded ones.
        bytes_reordered: of copies of the base's weights.
        adapters_registered: names.
        adapters_loaded: versions in memory.
    """

    steps: int = 0
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    preempted: int = 0
    loads: int = 0
    unloads: int = 0
    by_adapter: dict[str, int] = field(default_factory=dict)
    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    bytes_budget: int = 0
    bytes_adapters: int = 0
    bytes_reordered: int = 0
    adapters_registered: int = 0
    adapters_loaded: int = 0


class EngineSettings(Settings):
    """What an engine may take, and how it chooses."""

    memory_gb: float = Field(2.0, gt=0, description="for keys and values and adapters together, beside the base")
    page_tokens: int = Field(16, ge=1, le=1024, description="tokens of a page of keys and values")
    step_tokens: int = Field(256, ge=1, description="tokens of one forward pass: one for each answer, the rest prompts")
    max_running: int = Field(64, ge=1, description="answers that are computed at the same time")
    max_waiting: int = Field(1024, ge=1, description="answers that may wait; more are refused")
    max_adapters: int = Field(64, ge=1, description="different adapters among the answers that are computed")
    max_length: int | None = Field(
        None, ge=2, examples=[4096], description="prompt and answer in tokens; default: the model's window"
    )
    read_ahead_gb: float = Field(
        0.5, ge=0, description="for files of adapters that requests wait for, read before it is their turn; 0: none"
    )
    reordered_gb: float = Field(
        1.0,
        ge=0,
        description="for copies of the base's weights in the order that the processor reads fastest; 0: none",
    )
    prefix_cache: bool = Field(True, description="keep keys and values of prompts for those that begin alike")
    products: Literal["auto", "torch"] = Field(
        "auto", description="how updates of several adapters are computed: auto: by a kernel, where there is one"
    )
    patience: float = Field(2.0, ge=0, description="seconds a request may be passed by before it comes first")
    first_token_within: float | None = Field(
        None,
        gt=0,
        examples=[30.0],
        description="give up requests that have waited so many seconds for their first step",
    )

    @model_validator(mode="after")
    def _prompts_get_on(self) -> Self:
        if self.step_tokens < self.max_running + PROMPT_TOKENS:
            raise ValueError(
                f"step_tokens must be at least max_running + {PROMPT_TOKENS}: each answer takes one token of a step, "
                "and prompts get on with the rest"
            )
        return self
