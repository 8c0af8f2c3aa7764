"""Counts and times for Prometheus."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapterlab.serve.requests import Finished, Statistics

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_NOW = ("running", "waiting", "pages", "adapters", "bytes")  # what names of gauges begin with; the rest only grows


class Metrics:
    """What the server counts by itself; the engine's own counts are read when somebody asks.

    Args:
        statistics: of the engine.
    """

    def __init__(self, statistics: Callable[[], Statistics]):
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(statistics))
        counter = partial(Counter, labelnames=("adapter",), registry=self.registry)
        self.answers = Counter(
            "adapterlab_answers", "Answers by how they ended.", ("adapter", "reason"), registry=self.registry
        )
        self.refused = Counter(
            "adapterlab_refused", "Requests refused, by status.", ("status",), registry=self.registry
        )
        self.prompt = counter("adapterlab_prompt_tokens", "Tokens of prompts.")
        self.cached = counter("adapterlab_cached_tokens", "Of these, found in the prefix cache.")
        self.generated = counter("adapterlab_generated_tokens", "Tokens generated.")
        # Buckets by adapter would be a hundred thousand series for a few thousand adapters.
        times = partial(Histogram, buckets=_SECONDS, registry=self.registry)
        self.first = times("adapterlab_first_token_seconds", "From the request to its first token.")
        self.between = times("adapterlab_token_seconds", "From one token to the next of an answer.")

    def forget(self, adapter: str) -> None:
        """Drop the counts of an adapter that was removed, so that names that come and go do not add up."""
        for counter in (self.answers, self.prompt, self.cached, self.generated):
            counter.remove_by_labels({"adapter": adapter})

    def ended(self, adapter: str, end: Finished) -> None:
        """Count an answer.

        Args:
            adapter: name, or that of the base.
            end: its last event.
        """
        self.answers.labels(adapter, end.reason).inc()
        self.generated.labels(adapter).inc(end.generated_tokens)
        if end.index == 0:  # the answers of one request share its prompt
            self.prompt.labels(adapter).inc(end.prompt_tokens)
            self.cached.labels(adapter).inc(end.cached_tokens)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _Engine(Collector):
    """Reads the engine's statistics, one metric for each number."""

    def __init__(self, statistics: Callable[[], Statistics]):
        self.statistics = statistics

    def describe(self) -> list[Metric]:
        """Nothing: the engine is not asked before somebody wants to know."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield what is there now."""
        found = self.statistics()
        for field in dataclasses.fields(found):
            value = getattr(found, field.name)
            if isinstance(value, int):
                kind = GaugeMetricFamily if field.name.startswith(_NOW) else CounterMetricFamily
                yield kind(f"adapterlab_engine_{field.name}", f"Of the engine: {field.name}.", value=value)
