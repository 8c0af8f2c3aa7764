"""Choosing tokens: what a request asks for, by logits processors of transformers where they do it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from adapterlab.errors import ServingError
from adapterlab.serve.requests import Sampling

_BEFORE = 6  # tokens of the prompt, of which the first ones of an answer may be a continuation
Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Choice:
    """A chosen token, with what `Token` tells of it."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one answer; what it draws depends on its seed and its number alone."""

    def __init__(self, sampling: Sampling, index: int, prompt: int, processors: Sequence[Processor] = ()):
        """Prepare for one answer.

        Args:
            sampling: of the request.
            index: of the answer.
            prompt: tokens of the prompt.
            processors: of the request.
        """
        self.sampling, self.prompt = sampling, prompt
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            words = np.random.SeedSequence([sampling.seed, index]).generate_state(2)
            self.generator.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        self.processors = [*_penalties(sampling), *processors]
        self.warpers = _warpers(sampling) if sampling.temperature else []

    @property
    def is_plain(self) -> bool:
        """It takes the likeliest token, whatever came before."""
        s = self.sampling
        plain = not (s.temperature or self.processors or s.bias or s.presence_penalty or s.frequency_penalty)
        return plain and s.logprobs is None

    def choose(self, logits: Tensor, tokens: Sequence[int]) -> Choice:
        """Choose the next token.

        Args:
            logits: of the model, `[vocabulary]`.
            tokens: prompt and answer so far.

        Raises:
            ServingError: no token is left to choose from.
        """
        scores = logits.float()[None]
        for processor in self.processors:
            scores = processor(torch.tensor([tokens], device=logits.device), scores)
        scores = self._shifted(scores, tokens[self.prompt :])
        for warper in self.warpers:
            scores = warper(None, scores)
        if not torch.isfinite(scores.amax()):
            raise ServingError("No token may follow: the logits processors of the request left none.")
        if self.sampling.temperature:
            # The generator is the CPU's: a seed means the same everywhere.
            picked = int(torch.multinomial(scores[0].softmax(-1).cpu(), 1, generator=self.generator))
        else:
            picked = int(scores[0].argmax())
        return Choice(picked, *self._told(logits, picked))

    def _shifted(self, scores: Tensor, answer: Sequence[int]) -> Tensor:
        s, change = self.sampling, Counter[int]()
        if s.presence_penalty or s.frequency_penalty:
            for token, times in Counter(answer).items():
                change[token] -= s.presence_penalty + times * s.frequency_penalty  # type: ignore[assignment]
        for token, value in s.bias.items():
            change[token] += value  # type: ignore[assignment]
        if not change:
            return scores
        index = torch.tensor(list(change), device=scores.device)
        added = torch.tensor(list(change.values()), device=scores.device, dtype=scores.dtype)
        return scores.index_add(1, index, added[None])

    def _told(self, logits: Tensor, picked: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        count = self.sampling.logprobs
        if count is None:
            return None, ()
        known = logits.float().log_softmax(-1)
        values, ids = known.topk(count)
        return float(known[picked]), tuple(zip(ids.tolist(), values.tolist(), strict=True))


def choose_all(logits: Tensor, choosers: Sequence[tuple[Chooser, Sequence[int]]]) -> list[Choice | Exception]:
    """Choose for many answers; what goes wrong with one is in its place.

    Args:
        logits: `[answers, vocabulary]`.
        choosers: of each answer, with prompt and answer so far.
    """
    likeliest = logits.argmax(-1).tolist()
    found: list[Choice | Exception] = []
    for row, best, (chooser, tokens) in zip(logits, likeliest, choosers, strict=True):
        if chooser.is_plain:
            found.append(Choice(best))
            continue
        try:
            found.append(chooser.choose(row, tokens))
        except Exception as error:  # processors are the caller's
            found.append(error)
    return found


def _penalties(sampling: Sampling) -> list[Any]:
    penalty = sampling.repetition_penalty
    return [] if penalty == 1 else [RepetitionPenaltyLogitsProcessor(float(penalty))]


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    found: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    return found


class Text:
    """The text of an answer as it comes, without its stop texts."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: Sequence[int]):
        self.tokenizer, self.stops = tokenizer, stops
        self.ids = list(prompt[-_BEFORE:])
        self.begin, self.read = 0, len(self.ids)  # the tokens between them say in which form new ones continue
        self.held = ""

    def add(self, token: int) -> tuple[str, str | None]:
        """Return the text that is sure now, and the stop text that ends the answer, if one does."""
        if self.tokenizer is None:
            return "", None
        self.ids.append(token)
        self.held += self._new()
        ends = [(at, stop) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if ends:
            at, stop = min(ends, key=lambda end: end[0])
            sure, self.held = self.held[:at], ""
            return sure, stop
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        sure, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return sure, None

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        if self.tokenizer is None:
            return ""
        rest, self.held = self.held + self._new(last=True), ""
        return rest

    def _new(self, *, last: bool = False) -> str:
        """What the tokens that were not read add; nothing as long as a character is not whole."""
        before, whole = self._decoded(self.begin, self.read), self._decoded(self.begin, len(self.ids))
        if len(whole) <= len(before) or (whole.endswith("\ufffd") and not last):
            return ""
        self.begin, self.read = self.read, len(self.ids)
        return whole[len(before) :]

    def _decoded(self, start: int, stop: int) -> str:
        return str(self.tokenizer.decode(self.ids[start:stop], skip_special_tokens=True))

    def _overlap(self, stop: str) -> int:
        """How much of the end of what is held may be the beginning of a stop text."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)
