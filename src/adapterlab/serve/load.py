"""Load for a server, and what it feels like to its clients.

In a closed loop a number of clients ask, wait for the whole answer, and ask again: it shows how much a server does. In
an open loop requests come by a clock, however long the answers take: it shows how long people wait at a load.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import accumulate

from pydantic import Field

from adapterlab.errors import ServingError
from adapterlab.serve.client import Client
from adapterlab.settings import SEEDS, Settings

_MOST_OPEN = 512  # threads of an open loop; a server that is that far behind is not going to catch up


class Load(Settings):
    """What is asked of a server."""

    requests: int = Field(64, ge=1, description="in all")
    clients: int = Field(16, ge=1, le=_MOST_OPEN, description="of the closed loop")
    rate: float | None = Field(
        None, gt=0, examples=[4.0], description="requests a second of the open loop; default: a closed loop"
    )
    prompt_words: int = Field(24, ge=1, description="of each prompt; no two prompts begin alike")
    answer_tokens: int = Field(32, ge=1, description="of each answer")
    skew: float = Field(0.0, ge=0, description="exponent of Zipf's law by which adapters are chosen; 0: all alike")
    seed: int = Field(0, ge=0, lt=SEEDS, description="of prompts, adapters and times")


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        at: seconds after the start, of an open loop.
        model: the base or an adapter.
        prompt: a text.
    """

    at: float
    model: str
    prompt: str


@dataclass(frozen=True)
class Felt:
    """How it went.

    Attributes:
        first: seconds from when the request was due to its first text, or None.
        between: mean seconds from one token to the next, or None.
        tokens: of the answer.
        error: why there was none, or "".
    """

    first: float | None = None
    between: float | None = None
    tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a load came to.

    Attributes:
        seconds: from the first request to the last answer.
        felt: by request, in the order of their ends.
    """

    seconds: float
    felt: tuple[Felt, ...]

    def summary(self) -> dict[str, float | int | None]:
        """Rates and quantiles, in seconds."""
        good = [one for one in self.felt if not one.error]
        firsts = [one.first for one in good if one.first is not None]
        betweens = [one.between for one in good if one.between is not None]
        tokens = sum(one.tokens for one in good)
        return {
            "requests": len(self.felt), "errors": len(self.felt) - len(good), "seconds": self.seconds,
            "requests_per_second": len(good) / self.seconds, "tokens_per_second": tokens / self.seconds,
            "first_token_p50": quantile(firsts, 0.5), "first_token_p95": quantile(firsts, 0.95),
            "token_p50": quantile(betweens, 0.5), "token_p95": quantile(betweens, 0.95),
        }  # fmt: skip


def drawn(load: Load, models: Sequence[str]) -> Iterator[Asked]:
    """Draw the requests of a load; the same for the same seed.

    Args:
        load: what is asked.
        models: to choose among, the most wanted first.
    """
    draw, at = random.Random(load.seed), 0.0
    weights = list(accumulate(1 / rank**load.skew for rank in range(1, len(models) + 1)))
    for number in range(load.requests):
        at += draw.expovariate(load.rate) if load.rate is not None else 0.0
        words = " ".join(str(draw.randrange(1000)) for _ in range(load.prompt_words - 1))
        yield Asked(at, draw.choices(models, cum_weights=weights)[0], f"{number} {words}".strip())


def run(client: Client, load: Load, models: Sequence[str], progress: Callable[[int], None] | None = None) -> Outcome:
    """Put a load on a server.

    Args:
        client: of the server.
        load: what is asked.
        models: to choose among, the most wanted first.
        progress: called with the number of answers so far.

    Returns:
        How it went; requests that failed are counted as such.
    """
    asked = list(drawn(load, models))
    threads = min(load.requests, load.clients if load.rate is None else _MOST_OPEN)
    begun = time.monotonic()
    felt: list[Felt] = []
    with ThreadPoolExecutor(threads) as pool:
        waiting = []
        for one in asked:
            if load.rate is not None:
                time.sleep(max(0.0, begun + one.at - time.monotonic()))
            waiting.append(pool.submit(_ask, client, one, load.answer_tokens, begun + one.at if load.rate else None))
        for done in as_completed(waiting):
            felt.append(done.result())
            if progress:
                progress(len(felt))
    return Outcome(time.monotonic() - begun, tuple(felt))


def _ask(client: Client, asked: Asked, tokens: int, due: float | None) -> Felt:
    begun = time.monotonic() if due is None else due
    body = {
        "model": asked.model, "prompt": asked.prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    first = last = None
    made = 0
    try:
        for event in client.stream("/v1/completions", body):
            if any(choice.get("text") for choice in event["choices"]):
                last = time.monotonic()
                first = last if first is None else first
            made = (event.get("usage") or {}).get("completion_tokens", made)
    except ServingError as error:
        return Felt(error=str(error))
    between = (last - first) / (made - 1) if first is not None and last is not None and made > 1 else None
    return Felt(None if first is None else first - begun, between, made)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that a share of the values does not exceed; None of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
