"""Memory of serving: base weights, pages of keys and values, and adapters, as the engine holds them.

The engine's own forward pass (`serve.forward`) runs on tensors without contents: a step in which every sequence has its
full length and computes one token, beside a piece of a prompt.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapterlab.core.method import Method
from adapterlab.engine.reordered_weights import most_bytes
from adapterlab.errors import ConfigError
from adapterlab.hosts import Host
from adapterlab.plan.child import called
from adapterlab.plan.device import Device
from adapterlab.plan.planning import USUAL, setup_of
from adapterlab.plan.setup import Setup
from adapterlab.plan.simulate import NAME, build, tracked
from adapterlab.plan.tracker import Tracker
from adapterlab.serve.forms import bytes_of, fronts_of, length_of
from adapterlab.serve.forward import Forward, Row
from adapterlab.serve.requests import PROMPT_TOKENS, EngineSettings
from adapterlab.serve.whole_change import put_whole_change

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MANY = 1024  # sequences, at which the work of further ones is looked at


@dataclass(frozen=True)
class Serving:
    """Memory of a server.

    Attributes:
        base: bytes of the base weights.
        copies: bytes of copies of them in the order that the processor reads, at most.
        page: bytes of a page of keys and values, in all layers; page_tokens: tokens that it holds.
        adapter: bytes of the tensors of one adapter that is loaded; those that are not take none.
        front: pages of what an adapter puts in front of every sequence, instead of tensors.
        work: bytes that a step takes beside; more: for each further sequence.
        sequences: at once; adapters: loaded at once; length: tokens of a sequence, prompt and answer.
        limit: bytes of the device, or None.
        context: bytes that the device loses before the first tensor.
        keeps_paid: whether pages that are paid for adapters take memory too: a GPU gives all pages at once.
    """

    base: int
    copies: int
    page: int
    page_tokens: int
    adapter: int
    front: int
    work: int
    more: float
    sequences: int
    adapters: int
    length: int
    limit: int | None
    context: int
    keeps_paid: bool = False

    @property
    def pages_each(self) -> int:
        """Pages of a sequence."""
        return math.ceil(self.length / self.page_tokens)

    @property
    def cache(self) -> int:
        """Bytes of the keys and values of a sequence."""
        return self.pages_each * self.page

    @property
    def paid_each(self) -> int:
        """Pages that an adapter is paid for with."""
        return self.front + math.ceil(self.adapter / self.page)

    @property
    def memory_gb(self) -> float:
        """The engine's budget for these sequences and adapters: its setting of this name."""
        return (self.pages_each * self.sequences + self.paid_each * self.adapters) * self.page / 1e9

    @property
    def adapter_each(self) -> int:
        """Bytes that an adapter takes: tensors, pages in front, and pages that are paid where those take memory."""
        return self.adapter + (self.paid_each if self.keeps_paid else self.front) * self.page

    @property
    def total(self) -> int:
        """Bytes altogether, with the page of zeros that fills up tables."""
        kept = self.base + self.copies + self.page + self.cache * self.sequences + self.adapter_each * self.adapters
        return kept + self.work + self.context

    @property
    def most_sequences(self) -> int | None:
        """How many sequences fit beside these adapters; None without a limit."""
        if self.limit is None:
            return None
        each = self.cache + self.more
        return max(0, self.sequences + math.floor((self.limit - self.total) / each))

    @property
    def most_adapters(self) -> int | None:
        """How many adapters fit beside these sequences; None without a limit."""
        if self.limit is None or not self.adapter_each:
            return None
        return max(0, self.adapters + (self.limit - self.total) // self.adapter_each)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        derived = ("cache", "paid_each", "memory_gb", "total", "most_sequences", "most_adapters")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}


def plan_serving(
    model: str | Path | PretrainedConfig,
    method: str | Method | dict[str, Any] = USUAL,
    *,
    sequences: int = 1,
    adapters: int = 1,
    length: int = 4096,
    precision: str = "bf16",
    quantize: str | None = None,
    device: str | Device | None = None,
    settings: EngineSettings | None = None,
    trust_remote_code: bool = False,
) -> Serving:
    """Say what serving needs: the base once, pages for each sequence, the tensors of each adapter, a step's work.

    Args:
        model: as for `plan`.
        method: of the adapters, with its rank.
        sequences: answered at once, each of `length` tokens.
        adapters: loaded at once; on disk there may be any number.
        length: tokens of a sequence, prompt included.
        precision: of weights and pages.
        quantize: None, "nf4" or "int8".
        device: as for `plan`.
        settings: of the engine, whose `page_tokens`, `step_tokens` and `reordered_gb` count.
        trust_remote_code: run the code that the model brings.

    Raises:
        ConfigError: a number is out of range.
        ModelError: the engine cannot serve the model.
    """
    for what, value, least in (("sequences", sequences, 1), ("adapters", adapters, 0), ("length", length, 1)):
        if value < least:
            raise ConfigError(f"{what}={value} is too small: it must be at least {least}.")
    place = device if isinstance(device, Device) else Device.parse(device)
    setup = setup_of(
        model, method, batch=1, length=8, precision=precision, quantize=quantize, kind=place.kind,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    found: Serving = called(_simulated, setup, sequences, adapters, length, settings or EngineSettings(), place)
    return found


@torch.no_grad()
def _simulated(
    setup: Setup, sequences: int, adapters: int, length: int, settings: EngineSettings, place: Device
) -> Serving:
    with tracked(setup) as tracker:
        model = build(setup)
        base = tracker.total
        copies = most_bytes(model, int(settings.reordered_gb * 1e9)) if place.kind == "cpu" else 0
        adapter, front = _adapter(setup, model, settings.page_tokens)
        forward = Forward(model, settings.page_tokens)
        forward.make_pools(math.ceil(length / settings.page_tokens))
        piece = min(length, max(PROMPT_TOKENS, settings.step_tokens - sequences))
        work, further = (_work(forward, tracker, count, length, piece) for count in (sequences, 2 * sequences))
        more = max(0.0, (further - work) / sequences)
        found = Serving(
            base, copies, forward.page_bytes, settings.page_tokens, adapter, front, work, more, sequences, adapters,
            length, place.memory, place.context, place.kind != "cpu",
        )  # fmt: skip
        # The fullest moment of a step is another one with many sequences, which take more each.
        many = min(found.most_sequences or 0, _MANY)
        if many > 2 * sequences:
            further = _work(forward, tracker, many, length, piece)
            found = dataclasses.replace(found, more=max(found.more, (further - work) / (many - sequences)))
        return found


def _work(forward: Forward, tracker: Tracker, sequences: int, length: int, piece: int) -> int:
    """Bytes that a step takes beside weights and pages; where the pages of a row lie makes no difference."""
    pages = range(1, math.ceil(length / forward.page_tokens) + 1)
    rows = [Row([1], length - 1, pages)] * sequences + [Row([1] * piece, length - piece, pages)]
    before = tracker.total
    tracker.moments.clear()
    tracker.enter("step")
    forward.run(rows)
    return max(0, tracker.moments["step"].total - before)


def _adapter(setup: Setup, model: Any, page_tokens: int) -> tuple[int, int]:
    """Bytes of an adapter's tensors, and pages of what it puts in front, as the engine counts them."""
    host = Host(model)
    host.attach(setup.method.brief(), NAME)
    try:
        fronts = fronts_of(host, NAME)
        if fronts is not None:
            return 0, math.ceil(max(map(length_of, fronts.values())) / page_tokens)
        put_whole_change(host, NAME)
        return bytes_of(host, NAME), 0
    finally:
        host.detach(NAME)
