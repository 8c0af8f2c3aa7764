"""The engine without its thread: requests become sequences, steps are computed, and what comes out is handed on."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence as Many
from typing import Any

import torch
from torch import Tensor

from adapterlab.engine.products import Products, fastest
from adapterlab.engine.reordered_weights import ReorderedWeights
from adapterlab.errors import AdapterlabError, BusyError, ConfigError, ServingError, UnusableAdapterError
from adapterlab.evaluate.generation import stop_ids
from adapterlab.foreign.model import input_table, text_config
from adapterlab.serve.adapters import Adapters, Version
from adapterlab.serve.answers import Answering
from adapterlab.serve.forms import OnModel, row_of
from adapterlab.serve.forward import Forward
from adapterlab.serve.pages import Pages, PrefixCache
from adapterlab.serve.reading import Reader
from adapterlab.serve.requests import EngineSettings, Finished, Handle, Request, Statistics
from adapterlab.serve.sampling import choose_all
from adapterlab.serve.scheduler import Piece, Scheduler, Sequence
from adapterlab.serve.table import Table


class Worker:
    """A model, its pages, its adapters, and what is asked of it.

    Attributes:
        products: how updates of several adapters are computed, in words.
        reordered: copies of the base's weights.
        adapters: that are registered.
        scheduler: of sequences.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: EngineSettings):
        """Look at the model and make room.

        Raises:
            ModelError: the model cannot be served, with the reason.
            ConfigError: the memory is too small for a single page.
        """
        self.tokenizer, self.settings = tokenizer, settings
        self.forward = Forward(model, settings.page_tokens)
        count = int(settings.memory_gb * 1e9) // self.forward.page_bytes
        if not count:
            raise ConfigError(
                f"memory_gb={settings.memory_gb:g} is less than a page of keys and values, which takes "
                f"{self.forward.page_bytes / 1e9:.3g} GB here. Give more, or lower page_tokens."
            )
        self.forward.make_pools(count)
        self.pages = Pages(count)
        self.cache = PrefixCache(self.pages, settings.page_tokens)
        way, why = (None, "as settings say") if settings.products == "torch" else fastest(self.forward.device.type)
        self.products = f"torch ({why})" if way is None else way.name
        self.reader = Reader(int(settings.read_ahead_gb * 1e9))
        table = None if way is None else Table(model, self.forward, Products(way, model.dtype))
        self.on_model = OnModel(model, self.forward, self.pages, self.reader, table)
        self.adapters = Adapters(self.on_model, self.pages, self.cache, self.forward.page_bytes)
        positions = getattr(text_config(model), "max_position_embeddings", None)
        self.window = min((n for n in (positions, settings.max_length) if n is not None), default=None)
        self.scheduler = Scheduler(settings, self.pages, self.cache, self.adapters, positions)
        self.vocabulary = input_table(model).num_embeddings
        self.ends = frozenset(_end_ids(model, tokenizer))
        self._steps = self._in = self._cached = self._out = 0
        self._finished: Counter[str] = Counter()
        self._by_adapter: Counter[str] = Counter()
        self.reordered = ReorderedWeights(model, int(settings.reordered_gb * 1e9))

    @property
    def is_idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.scheduler.waiting and not self.scheduler.running

    # ------------------------------------------------------------------ requests

    def add(self, handle: Handle) -> None:
        """Let a request wait, one sequence for each answer.

        Raises:
            ConfigError, UnknownAdapterError, UnusableAdapterError, BusyError: see `Engine.submit`.
        """
        request = handle.request
        version = None if request.adapter is None else self.adapters.find(request.adapter, request.tenant)
        if version is not None and version.state == "quarantined":
            raise UnusableAdapterError(version.reason)
        self._check(request, version)
        if len(self.scheduler.waiting) + request.sampling.n > self.settings.max_waiting:
            raise BusyError(
                f"{len(self.scheduler.waiting)} answers are waiting, of max_waiting={self.settings.max_waiting}. Ask "
                "again later."
            )
        limit = len(request.prompt) + request.sampling.max_tokens
        sequences = [
            Sequence(list(request.prompt), limit, version, request.tenant, request.priority, handle.submitted)
            for _ in range(request.sampling.n)
        ]
        for index, sequence in enumerate(sequences):
            sequence.owner = Answering(handle, index, sequence, self.tokenizer, self.ends)
            sequence.leader = sequences[0] if index else None
        for sequence in sequences:
            self.scheduler.add(sequence)
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Let the files be read that requests wait for, in their order."""
        waiting = dict.fromkeys(sequence.version for sequence in self.scheduler.waiting.values())
        self.reader.want(one for one in waiting if one is not None and one.state == "registered")

    def remove(self, name: str, tenant: str | None) -> None:
        """Forget an adapter and what was counted under its name.

        Raises:
            UnknownAdapterError: there is none of this name for exactly this tenant.
        """
        self.adapters.remove(name, tenant)
        self._by_adapter.pop(name, None)

    def pin(self, version: Version) -> None:
        """Put an adapter on the model and keep it there.

        Raises:
            UnusableAdapterError: it cannot be loaded or served, with the reason.
            BusyError: there is no room, or answers that were accepted need it.
        """
        self.adapters.now(version)
        self.scheduler.pin(version)

    def _check(self, request: Request, version: Version | None) -> None:
        prompt, sampling = request.prompt, request.sampling
        wrong = next((i for i in (*prompt, *sampling.bias) if not 0 <= i < self.vocabulary), None)
        total = len(prompt) + sampling.max_tokens
        pages = -(-total // self.settings.page_tokens)
        if not prompt:
            raise ConfigError("The prompt is empty. Give at least one token.")
        if wrong is not None:
            raise ConfigError(f"{wrong} is no token of this model, whose ids are 0 to {self.vocabulary - 1}.")
        if self.window is not None and total > self.window:
            raise ConfigError(
                f"A prompt of {len(prompt)} tokens and max_tokens={sampling.max_tokens} do not fit into the window of "
                f"{self.window}. Shorten the prompt, or lower max_tokens."
            )
        if not self.adapters.could_hold(version, pages):
            raise ConfigError(
                f"{total} tokens take {pages} pages of {self.settings.page_tokens}, and with the adapters that are "
                f"needed or pinned there are not so many ({self.pages.count} in all). Lower max_tokens, or start with "
                "more memory_gb."
            )
        if sampling.stop and self.tokenizer is None:
            raise ConfigError("Stop texts need a tokenizer, and the engine has none. Give stop_ids.")

    # ------------------------------------------------------------------ a step

    def plan(self) -> list[Piece]:
        """End what was cancelled or waits too long, and say what the next step computes."""
        now = time.monotonic()
        self._sweep(now)
        pieces = self.scheduler.plan(now)
        while self.scheduler.refused:
            refused, self.scheduler.refused = self.scheduler.refused, []
            for sequence, error in refused:
                self._fail(sequence, error)
            pieces = [piece for piece in pieces if not piece.sequence.ended] or self.scheduler.plan(now)
        self._read_ahead()
        if not pieces:
            self.on_model.rest()
        # Those that go through the same adapters stand beside each other.
        return sorted(pieces, key=lambda piece: _group(piece.sequence.version))

    def compute(self, pieces: Many[Piece]) -> list[tuple[list[Piece], Tensor | Exception]]:
        """Compute a step: pieces, and the logits of those that choose, or why there are none.

        If a pass fails, its groups are computed one by one, so that the fault stays with whose it is.
        """
        self._steps += 1
        try:
            return [(list(pieces), self._pass(pieces))]
        except Exception as error:  # of a model and of methods that others wrote
            self.on_model.rest()
            groups = [list(g) for _, g in itertools.groupby(pieces, lambda piece: piece.sequence.version)]
            if len(groups) == 1:
                return [(list(pieces), error)]
        return [one for group in groups for one in self.compute(group)]

    def _pass(self, pieces: Many[Piece]) -> Tensor:
        rows, segments = [], []
        for piece in pieces:
            version, tokens = piece.sequence.version, piece.sequence.tokens[piece.start : piece.stop]
            rows.append(row_of(version, tokens, piece.start, piece.sequence.pages, piece.chooses))
            segments.append((version, len(tokens)))
        self.on_model.live(segments)
        return self.forward.run(rows)

    def apply(self, done: Many[tuple[list[Piece], Tensor | Exception]]) -> None:
        """Choose tokens from what was computed, and hand them on."""
        for pieces, logits in done:
            if isinstance(logits, Exception):
                self._spoiled([piece.sequence for piece in pieces], _told(logits), isinstance(logits, MemoryError))
                continue
            choosing = [piece for piece in pieces if piece.chooses]
            sound = torch.isfinite(logits.amax(-1)).tolist() if choosing else []
            broken = {piece.sequence for piece, fine in zip(choosing, sound, strict=True) if not fine}
            owners = [piece.sequence.owner for piece in choosing]
            chosen = choose_all(logits, [(owner.chooser, owner.sequence.tokens) for owner in owners]) if owners else []
            for piece in pieces:
                if piece.sequence not in broken:
                    self._note(piece)
            for sequence in broken:
                self._spoiled([sequence], "It computes numbers that are not finite.")
            for piece, choice in zip(choosing, chosen, strict=True):
                if piece.sequence.ended:
                    continue
                if isinstance(choice, Exception):
                    self._fail(piece.sequence, _as_ours(choice))
                else:
                    self._take(piece.sequence, choice)

    def _note(self, piece: Piece) -> None:
        self._in += max(0, min(piece.stop, piece.sequence.prompt) - piece.start)
        self.scheduler.computed(piece)

    def _take(self, sequence: Sequence, choice: Any) -> None:
        self._out += 1
        self._by_adapter["" if sequence.version is None else sequence.version.name] += 1
        end = sequence.owner.take(choice)
        if end is not None:
            self._end(sequence, end)

    # ------------------------------------------------------------------ ends

    def _sweep(self, now: float) -> None:
        limit = self.settings.first_token_within
        for sequence in [*self.scheduler.waiting.values(), *self.scheduler.running]:
            if sequence.owner.handle.cancelled:
                self._end(sequence, sequence.owner.end("cancelled"))
            elif limit is not None and sequence.cached is None and now - sequence.arrived > limit:
                self._fail(sequence, BusyError(f"The request had no step in {limit:g} seconds. Ask again later."))
            elif sequence.version is not None and sequence.version.state == "quarantined":
                self._fail(sequence, UnusableAdapterError(sequence.version.reason))

    def _spoiled(self, sequences: Many[Sequence], why: str, ours: bool = False) -> None:
        """End sequences whose step went wrong, and their adapter with them, unless the fault is not its own."""
        for sequence in sequences:
            version = sequence.version
            error: AdapterlabError = ServingError(f"The request could not be computed. {why}")
            if version is not None and not ours:
                self.adapters.quarantine(version, why)
                error = UnusableAdapterError(version.reason)
            self._end(sequence, sequence.owner.end("error", error=error), spoiled=True)

    def _fail(self, sequence: Sequence, error: AdapterlabError) -> None:
        if not sequence.ended:
            self._end(sequence, sequence.owner.end("error", error=error))

    def _end(self, sequence: Sequence, end: Finished, *, spoiled: bool = False) -> None:
        self._finished[end.reason] += 1
        self._cached += end.cached_tokens
        self.forward.clear(self.scheduler.end(sequence, spoiled=spoiled))
        sequence.owner.handle.put(end)

    def end_all(self, error: AdapterlabError | None = None) -> None:
        """End all sequences, as cancelled or with an error."""
        for sequence in [*self.scheduler.waiting.values(), *self.scheduler.running]:
            reason = sequence.owner.end("cancelled" if error is None else "error", error=error)
            self._end(sequence, reason)

    def close(self) -> None:
        """Take the adapters off the model and give the memory back."""
        self.end_all()
        self.on_model.rest()
        self.reader.close()
        self.cache.forget()
        self.adapters.close()
        self.on_model.close()
        self.reordered.close()
        self.forward.pools.clear()

    # ------------------------------------------------------------------ what is known

    def statistics(self) -> Statistics:
        """Return counts."""
        loaded, idle = self.adapters.loaded, self.cache.idle
        page = self.forward.page_bytes
        return Statistics(
            steps=self._steps,
            tokens_in=self._in,
            tokens_cached=self._cached,
            tokens_out=self._out,
            finished=dict(self._finished),
            preempted=self.scheduler.preempted,
            loads=self.adapters.loads,
            unloads=self.adapters.unloads,
            by_adapter=dict(self._by_adapter),
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            pages=self.pages.count,
            pages_used=self.pages.held - idle + self.pages.paid,
            pages_cached=idle,
            bytes_budget=self.pages.count * page,
            bytes_adapters=sum(version.bytes + len(version.pages) * page for version in loaded),
            bytes_reordered=self.reordered.bytes,
            adapters_registered=len(self.adapters),
            adapters_loaded=len(loaded),
        )


def _group(version: Version | None) -> int:
    """A number for what tokens go through: those with pages in front go through the base."""
    return 0 if version is None or version.form == "pages" else version.uid


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    if tokenizer is not None:
        return stop_ids(model, tokenizer)
    ends = model.generation_config.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, AdapterlabError) else f"{type(error).__name__}: {str(error)[:300]}"


def _as_ours(error: Exception) -> AdapterlabError:
    return error if isinstance(error, AdapterlabError) else ServingError(f"A logits processor failed: {_told(error)}")
