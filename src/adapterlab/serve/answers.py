"""One answer on its way out: its text, its end, and the events of both."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from adapterlab.errors import AdapterlabError
from adapterlab.serve.requests import Finished, Handle, Reason, Token
from adapterlab.serve.sampling import Choice, Chooser, Text
from adapterlab.serve.scheduler import Sequence


class Answering:
    """What the engine keeps with a sequence.

    Attributes:
        sequence: with the tokens.
        handle: of the request.
        chooser: of its tokens.
    """

    def __init__(self, handle: Handle, index: int, sequence: Sequence, tokenizer: Any, ends: Container[int]):
        """Begin an answer.

        Args:
            handle: of the request.
            index: of the answer.
            sequence: with its prompt.
            tokenizer: for texts, or None.
            ends: the model's own end tokens.
        """
        request = handle.request
        processors = request.processors() if request.processors is not None else []
        self.handle, self.index, self.sequence, self.ends = handle, index, sequence, ends
        self.chooser = Chooser(request.sampling, index, len(request.prompt), processors)
        self.text = Text(tokenizer, request.sampling.stop, request.prompt)

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.sequence.tokens) - self.sequence.prompt

    def take(self, choice: Choice) -> Finished | None:
        """Add a token and hand it on; return the end of the answer if that was its last one."""
        sampling, sequence = self.handle.request.sampling, self.sequence
        sequence.tokens.append(choice.id)
        ends = choice.id in sampling.stop_ids or (choice.id in self.ends and not sampling.ignore_end)
        text, stop = ("", None) if ends else self.text.add(choice.id)
        full = len(sequence.tokens) >= sequence.limit
        last = ends or stop is not None or full
        self.handle.put(Token(self.index, choice.id, text, choice.logprob, choice.top, last))
        if ends:
            return self.end("stop", stopped_by=choice.id)
        if stop is not None:
            return self.end("stop", stopped_by=stop)
        return self.end("length") if full else None

    def end(
        self, reason: Reason, *, stopped_by: str | int | None = None, error: AdapterlabError | None = None
    ) -> Finished:
        """Return the end of the answer; whoever asked hands it on when the books are in order."""
        rest = self.text.rest() if not isinstance(stopped_by, str) else ""
        sequence = self.sequence
        return Finished(
            self.index, reason, rest, stopped_by, error, sequence.prompt, sequence.cached or 0, self.generated
        )
