"""A conversation with a model: its history, its system message, and what fits into the window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from adapterlab.errors import DataError
from adapterlab.evaluate.generation import chat_ids, stream, window_of
from adapterlab.foreign.model import is_encoder_decoder

Message = dict[str, str]


@dataclass
class Conversation:
    """The turns so far, and how to answer the next one.

    Attributes:
        model: of transformers; adapters may be switched between turns.
        tokenizer: its tokenizer.
        system: system message, or None.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token.
        seed: of the sampling.
        turns: user's and assistant's turns, oldest first.
    """

    model: Any
    tokenizer: Any
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    turns: list[Message] = field(default_factory=list)

    def say(self, text: str, show: Callable[[str], None]) -> None:
        """Put a question and pass the answer on as it comes; an interrupted answer is kept as far as it came.

        Args:
            text: what the user says.
            show: called with each new piece of the answer.

        Raises:
            DataError: the question alone does not fit into the model's window; the history stays as it was.
        """
        asked = [*self.turns, {"role": "user", "content": text}]
        turns, ids = self._fitting(asked)
        pieces: list[str] = []

        def keep(piece: str) -> None:
            pieces.append(piece)
            show(piece)

        try:
            stream(
                self.model,
                self.tokenizer,
                ids,
                show=keep,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=self.seed + len(turns),  # or the same question would get the same "random" answer each time
            )
        finally:
            self.turns = [*turns, {"role": "assistant", "content": "".join(pieces)}]

    def reset(self) -> None:
        """Forget all turns."""
        self.turns = []

    def _fitting(self, turns: list[Message]) -> tuple[list[Message], list[int]]:
        """Drop the oldest question and answer until the rest leaves room for an answer."""
        window = window_of(self.model, self.tokenizer)
        system = [{"role": "system", "content": self.system}] if self.system else []
        seq2seq = is_encoder_decoder(self.model)
        while True:
            ids = chat_ids(self.tokenizer, [*system, *turns], seq2seq=seq2seq)
            if window is None or len(ids) + (0 if seq2seq else self.max_new_tokens) <= window:
                return turns, ids
            if len(turns) < 3:
                raise DataError(
                    f"This message has {len(ids)} tokens with its system message; with an answer of up to "
                    f"{self.max_new_tokens} tokens it does not fit into the model's window of {window}. Shorten it, or "
                    "start again with a lower --max-new-tokens."
                )
            turns = turns[2:]
