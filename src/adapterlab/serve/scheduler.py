"""What the next step computes: who is admitted, who gives way, and which tokens of whom.

Bookkeeping alone, without a model: tests drive it by themselves. A step takes one token of each answer that is being
generated, and fills up with pieces of prompts.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from adapterlab.errors import AdapterlabError, BusyError, ConfigError
from adapterlab.serve.adapters import Adapters, Version
from adapterlab.serve.fairness import GENERATED, Counters
from adapterlab.serve.pages import Pages, PrefixCache, Root
from adapterlab.serve.requests import PROMPT_TOKENS, EngineSettings

_NO_ROOM = (
    "There is no room for this request and its adapter beside the adapters that are pinned. Unpin one, shorten the "
    "request, or start with more memory_gb."
)


@dataclass(eq=False)
class Sequence:
    """One answer on its way.

    Attributes:
        tokens: prompt, and what was generated.
        prompt: how many of them are the prompt.
        limit: how many there may be at most.
        version: of the adapter, or None for the base.
        tenant: who asked.
        priority: see `Request`.
        arrived: seconds, when.
        number: by arrival, unique.
        leader: an answer to the same prompt that is computed first, so that this one finds its keys and values.
        owner: what the engine keeps with it.
        pages: of its tokens, in order.
        computed: tokens whose keys and values are in the pages.
        cached: tokens of the prompt that were there already when it was first admitted; None before.
        ended: it gets no further step.
    """

    tokens: list[int]
    limit: int
    version: Version | None = None
    tenant: str | None = None
    priority: int = 0
    arrived: float = 0.0
    number: int = 0
    leader: Sequence | None = None
    owner: Any = None
    prompt: int = 0
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int | None = None
    ended: bool = False

    def __post_init__(self) -> None:
        self.prompt = self.prompt or len(self.tokens)

    @property
    def root(self) -> Root:
        """Whose keys and values it has."""
        return (0 if self.version is None else self.version.uid, self.tenant)

    @property
    def lane(self) -> Version | None:
        """With whom it can share a step: None: with all others of None."""
        return self.version if self.version is not None and self.version.form == "alone" else None


@dataclass(frozen=True)
class Piece:
    """Tokens of a sequence that a step computes; if they are its last ones, the next token is chosen after them."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def chooses(self) -> bool:
        """The step gives logits for it."""
        return self.stop == len(self.sequence.tokens)


class Scheduler:
    """Sequences that wait and run.

    Attributes:
        waiting: without pages, by number.
        running: with pages and a reference to their adapter, in order of admission.
        preempted: how often one had to give its pages back.
        refused: sequences that cannot be computed, and why; whoever plans ends them.
    """

    def __init__(
        self, settings: EngineSettings, pages: Pages, cache: PrefixCache, adapters: Adapters, window: int | None = None
    ):
        """Schedule with what others keep books of.

        Args:
            settings: of the engine.
            pages: of keys and values.
            cache: of prefixes, in the same pages.
            adapters: that are paid in the same pages.
            window: positions that the model has; None: no end of them.
        """
        self.window = window
        self.settings, self.pages, self.cache, self.adapters = settings, pages, cache, adapters
        self.waiting: dict[int, Sequence] = {}
        self.running: list[Sequence] = []
        self.preempted = 0
        self.refused: list[tuple[Sequence, AdapterlabError]] = []
        self.by_tenant = Counters()
        self.by_adapter: defaultdict[str | None, Counters] = defaultdict(Counters)  # of each tenant
        self._numbers = itertools.count()
        self._turns = itertools.count(1)
        self._turn: dict[Version | None, int] = {}  # when a lane had its last step

    # ------------------------------------------------------------------ coming and going

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait."""
        sequence.number = next(self._numbers)
        everyone = [*self.waiting.values(), *self.running]
        tenants = {s.tenant for s in everyone}
        if sequence.tenant not in tenants:
            self.by_tenant.join(sequence.tenant, tenants)
        adapters = {s.root for s in everyone if s.tenant == sequence.tenant}
        if sequence.root not in adapters:
            self.by_adapter[sequence.tenant].join(sequence.root, adapters)
        self._wait(sequence)

    def end(self, sequence: Sequence, *, spoiled: bool = False) -> list[int]:
        """Let a sequence go, wherever it is.

        Args:
            sequence: that has ended, or was cancelled.
            spoiled: its keys and values must not be used again.

        Returns:
            The pages that were spoiled: they have to be cleared before anybody takes them.
        """
        sequence.ended = True
        bad = [page for page in sequence.pages if self.pages.holders(page) == 1] if spoiled else []
        if self.waiting.pop(sequence.number, None) is not None:
            if sequence.version is not None:
                sequence.version.waiting -= 1
        elif sequence in self.running:
            self._stop(sequence, keep=not spoiled)
        if sequence.version is not None:
            self.adapters.settle(sequence.version)
        return bad

    def pin(self, version: Version) -> None:
        """Never unload an adapter that is loaded, unless that takes room that an accepted answer needs for its end.

        Raises:
            BusyError: it does; the adapter stays loaded as long as nobody needs its room.
        """
        if version.pinned:
            return
        fitting = [s for s in (*self.running, *self.waiting.values()) if self._fits(s)]
        version.pinned = True
        short = sum(not self._fits(s) for s in fitting)
        if short:
            version.pinned = False
            raise BusyError(
                f"The adapter {version.name!r} is not pinned: it takes {version.room} of {self.pages.count} pages, and "
                f"{short} of the answers that were accepted would find no room for their last tokens. Pin it when they "
                "have ended, unpin another one, or start with more memory_gb."
            )

    def _fits(self, sequence: Sequence) -> bool:
        """Say whether a sequence has room for all its tokens when everything else that can go has gone."""
        return self.adapters.could_hold(sequence.version, self._pages_for(sequence.limit))

    def _wait(self, sequence: Sequence) -> None:
        self.waiting[sequence.number] = sequence
        if sequence.version is not None:
            sequence.version.waiting += 1

    def _stop(self, sequence: Sequence, *, keep: bool) -> None:
        """Take pages and the reference to the adapter from a running sequence."""
        self.running.remove(sequence)
        if keep and self.settings.prefix_cache:
            self.cache.keep(sequence.root, sequence.tokens[: sequence.computed], sequence.pages)
        self.pages.drop(sequence.pages)
        sequence.pages, sequence.computed = [], 0
        if sequence.version is not None:
            sequence.version.running -= 1
        if not any(other.lane is sequence.lane for other in self.running):
            self._turn.pop(sequence.lane, None)

    # ------------------------------------------------------------------ a step

    def plan(self, now: float) -> list[Piece]:
        """Admit who can be, and choose what the next step computes; nothing if there is nobody."""
        self._admit(now)
        lanes = dict.fromkeys(sequence.lane for sequence in self.running)
        if not lanes:
            return []
        lane = min(lanes, key=lambda one: self._turn.get(one, 0))
        self._turn[lane] = next(self._turns)
        return self._pieces([s for s in self.running if s.lane is lane])

    def _pieces(self, sequences: list[Sequence]) -> list[Piece]:
        """One token of each that generates, then pieces of prompts, first come first served."""
        pieces, left = [], self.settings.step_tokens
        for sequence in [s for s in sequences if len(s.tokens) - s.computed == 1]:
            if sequence in self.running and self._has_room(sequence):  # others may have made it give way
                pieces.append(Piece(sequence, sequence.computed, len(sequence.tokens)))
        pieces = [piece for piece in pieces if piece.sequence in self.running]
        left -= len(pieces)
        for sequence in [s for s in sequences if s in self.running and len(s.tokens) - s.computed > 1]:
            missing = len(sequence.tokens) - sequence.computed
            count = min(missing, left)
            if count < min(missing, PROMPT_TOKENS):
                break
            pieces.append(Piece(sequence, sequence.computed, sequence.computed + count))
            left -= count
        return pieces

    def computed(self, piece: Piece) -> None:
        """Note that a piece was computed, before the token that it chose is added."""
        sequence = piece.sequence
        sequence.computed = piece.stop
        generated = max(0, piece.stop - max(piece.start, sequence.prompt))
        cost = piece.stop - piece.start - generated + GENERATED * generated
        self.by_tenant.charge(sequence.tenant, cost)
        self.by_adapter[sequence.tenant].charge(sequence.root, cost)
        if piece.chooses and self.settings.prefix_cache and piece.stop <= sequence.prompt:
            self.cache.keep(sequence.root, sequence.tokens[: piece.stop], sequence.pages)

    # ------------------------------------------------------------------ admission

    def _admit(self, now: float) -> None:
        """Give pages and adapters to those that wait, as long as there is room.

        One that has been passed by for long comes first, and then nobody passes it any more: it starts when enough of
        those that run have ended.
        """
        if not self.waiting or len(self.running) >= self.settings.max_running:
            return
        distinct = Counter(s.version for s in self.running if s.version is not None)
        for sequence in self._order(now):
            if len(self.running) >= self.settings.max_running:
                break
            if self._follows(sequence):
                continue
            version = sequence.version
            if self.running and not self._is_at_hand(version):
                continue  # those that run do not wait for a disk; it comes with the next step or one after it
            crowded = version is not None and version not in distinct and len(distinct) >= self.settings.max_adapters
            try:
                started = not crowded and self._start(sequence)
            except AdapterlabError as error:
                self.refused.append((sequence, error))
                continue
            if started:
                distinct.update([] if version is None else [version])
            elif not self.running:
                self.refused.append((sequence, BusyError(_NO_ROOM)))  # nobody will make room by ending
            elif self._overdue(sequence, now):
                break

    def _order(self, now: float) -> list[Sequence]:
        active = {s.version for s in self.running}

        def rank(s: Sequence) -> tuple[Any, ...]:
            if self._overdue(s, now):
                return (0, s.number)
            cold = s.version not in active and s.version is not None and not s.version.is_loaded
            return (1, -s.priority, self.by_tenant[s.tenant], cold, self.by_adapter[s.tenant][s.root], s.number)

        return sorted(self.waiting.values(), key=rank)

    def _is_at_hand(self, version: Version | None) -> bool:
        return version is None or version.is_loaded or self.adapters.loader.is_at_hand(version)

    def _overdue(self, sequence: Sequence, now: float) -> bool:
        return now - sequence.arrived > self.settings.patience

    def _follows(self, sequence: Sequence) -> bool:
        """Say whether a sequence should wait for the prompt of another one."""
        leader = sequence.leader
        if leader is None or leader.ended or not self.settings.prefix_cache:
            return False
        return leader.computed < sequence.prompt

    def _start(self, sequence: Sequence) -> bool:
        """Give a sequence its adapter and pages for all its tokens and one more; or nothing, if there is no room.

        Raises:
            UnusableAdapterError: the adapter cannot be used.
            BusyError: it is larger than its files said, so that there will not be room for all tokens.
            ConfigError: it puts so much in front that the sequence does not fit into the model's window.
        """
        version = sequence.version
        if version is not None:
            if not self.adapters.load(version):
                return False
            if not self._fits(sequence):
                raise BusyError(_NO_ROOM)
            if self.window is not None and sequence.limit + version.shift > self.window:
                raise ConfigError(
                    f"The adapter {version.name!r} takes {version.shift} positions, so that prompt and answer of "
                    f"{sequence.limit} tokens do not fit into the model's window of {self.window}. Shorten them."
                )
            version.running += 1  # nobody unloads it while room for the pages is made
        found = self.cache.find(sequence.root, sequence.tokens[:-1]) if self.settings.prefix_cache else []
        missing = self._pages_for(len(sequence.tokens) + 1) - len(found)
        if not self.adapters.make_room(missing):
            self.pages.drop(found)
            if version is not None:
                version.running -= 1
            return False
        del self.waiting[sequence.number]
        if version is not None:
            version.waiting -= 1
        sequence.pages = found + self.pages.take(missing)
        sequence.computed = len(found) * self.settings.page_tokens
        if sequence.cached is None:
            sequence.cached = sequence.computed
        self.running.append(sequence)
        return True

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.settings.page_tokens)

    # ------------------------------------------------------------------ giving way

    def _has_room(self, sequence: Sequence) -> bool:
        """Give a sequence the page that its next token needs; who came last gives way, perhaps itself.

        The last one always finds it: `_start` and `pin` see to that. All that can be in its way are prefixes that
        others left, and that pages of its own continue.
        """
        missing = self._pages_for(len(sequence.tokens)) - len(sequence.pages)
        while missing > 0 and not self.adapters.make_room(missing):
            if len(self.running) == 1:
                self.cache.forget()
                self.adapters.make_room(missing)
                break
            victim = max(self.running, key=lambda s: (-s.priority, s.number))
            self.preempted += 1
            self._stop(victim, keep=True)
            self._wait(victim)
            if victim is sequence:
                return False
        sequence.pages += self.pages.take(max(0, missing))
        return True
