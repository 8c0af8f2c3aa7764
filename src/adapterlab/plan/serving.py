"""Memory of serving: base weights, caches of keys and values, and adapters side by side."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapterlab.core.method import Method
from adapterlab.errors import ConfigError
from adapterlab.foreign.model import text_config
from adapterlab.models.loading import PRECISIONS
from adapterlab.plan.child import called
from adapterlab.plan.device import Device
from adapterlab.plan.planning import USUAL, setup_of, trace_of
from adapterlab.plan.setup import Setup
from adapterlab.plan.simulate import ADAPTER, build
from adapterlab.plan.tracker import Tracker, contentless

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_PREFILL = 512  # tokens of one row that a server reads at once


@dataclass(frozen=True)
class Serving:
    """Memory of a server.

    Attributes:
        base: bytes of the base weights.
        cache: bytes of the keys and values of one full sequence.
        adapter: bytes of one adapter.
        work: bytes that reading a prompt takes beside.
        sequences: at once; adapters: resident at once; length: tokens of a sequence.
        limit: bytes of the device, or None.
        context: bytes that the device loses before the first tensor.
    """

    base: int
    cache: int
    adapter: int
    work: int
    sequences: int
    adapters: int
    length: int
    limit: int | None
    context: int

    @property
    def total(self) -> int:
        """Bytes altogether."""
        kept = self.base + self.cache * self.sequences + self.adapter * self.adapters
        return kept + self.work + self.context

    @property
    def most_sequences(self) -> int | None:
        """How many sequences fit beside these adapters; None without a limit."""
        if self.limit is None:
            return None
        free = self.limit - (self.total - self.cache * self.sequences)
        return max(0, free // self.cache)

    @property
    def most_adapters(self) -> int | None:
        """How many adapters fit beside these sequences; None without a limit."""
        if self.limit is None or not self.adapter:
            return None
        free = self.limit - (self.total - self.adapter * self.adapters)
        return max(0, free // self.adapter)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        most = {"most_sequences": self.most_sequences, "most_adapters": self.most_adapters}
        return {**dataclasses.asdict(self), "total": self.total, **most}


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
    trust_remote_code: bool = False,
) -> Serving:
    """Say what serving needs: the base once, a cache for each sequence, the tensors of each adapter.

    Args:
        model: as for `plan`.
        method: of the adapters, with its rank.
        sequences: generated at once, each of `length` tokens.
        adapters: resident at once.
        length: tokens of a sequence, prompt included.
        precision: of weights and caches.
        quantize: None, "nf4" or "int8".
        device: as for `plan`.
        trust_remote_code: run the code that the model brings.

    Raises:
        ConfigError: a number is out of range.
    """
    for what, value, least in (("sequences", sequences, 1), ("adapters", adapters, 0)):
        if value < least:
            raise ConfigError(f"{what}={value} is too small: it must be at least {least}.")
    place = device if isinstance(device, Device) else Device.parse(device)
    setup = setup_of(
        model, method, batch=1, length=max(8, length), precision=precision, quantize=quantize, kind=place.kind,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    base, work = called(_base_and_work, setup, min(length, _PREFILL))
    trace = trace_of(dataclasses.replace(setup, length=8))
    adapter = trace.resting.get(ADAPTER, 0)
    cache = cache_bytes(setup.config, length, PRECISIONS[precision].itemsize)
    return Serving(base, cache, adapter, work, sequences, adapters, length, place.memory, place.context)


def cache_bytes(config: PretrainedConfig, length: int, itemsize: int) -> int:
    """Bytes of the keys and values of one sequence; layers with a window keep no more than that.

    Args:
        config: of the model.
        length: tokens.
        itemsize: bytes of a number.
    """
    text: Any = text_config(config)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None) or length
    # A sliding cache keeps one token less than its window: the newest is added when it is used.
    kept = [min(length, window - 1) if kind == "sliding_attention" else length for kind in kinds]
    if not getattr(text, "layer_types", None) and getattr(text, "sliding_window", None):
        kept = [min(length, window - 1)] * len(kinds)
    return 2 * heads * width * itemsize * sum(kept)


def _base_and_work(setup: Setup, tokens: int) -> tuple[int, int]:
    """Bytes of the base weights, and of what reading a piece of a prompt takes beside."""
    with contentless() as fake, Tracker(fake, setup.granularity) as tracker:
        made = build(setup)
        return tracker.total, _work(made, tracker, tokens, setup.precision)


@torch.no_grad()
def _work(model: Any, tracker: Tracker, tokens: int, precision: str) -> int:
    """Bytes that reading a piece of a prompt takes beyond weights and caches."""
    before = tracker.total
    tracker.moments.clear()
    tracker.enter("prompt")
    out = model(input_ids=torch.ones(1, tokens, dtype=torch.int64), use_cache=True, logits_to_keep=1)
    peak = tracker.moments["prompt"].total - before
    kept = cache_bytes(model.config, tokens, PRECISIONS[precision].itemsize)
    del out
    return max(0, peak - kept)
