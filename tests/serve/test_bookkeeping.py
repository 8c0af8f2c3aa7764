"""Pages, prefixes, versions and turns, without a model: nothing leaks, and nobody waits for ever."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Collection, Hashable
from typing import Any

import pytest

from adapterlab.errors import AdapterlabError, BusyError, FormatError, UnknownAdapterError, UnusableAdapterError
from adapterlab.serve.adapters import Adapters, Version
from adapterlab.serve.fairness import Counters
from adapterlab.serve.pages import Pages, PrefixCache
from adapterlab.serve.requests import EngineSettings
from adapterlab.serve.scheduler import Scheduler, Sequence


class Fake:
    """A loader without a model: forms and sizes follow from the names of folders; what is on is remembered."""

    def __init__(self, pages: Pages):
        self.pages, self.on, self.late = pages, set[int](), set[int]()

    def is_at_hand(self, version: Version) -> bool:
        return version.uid not in self.late

    def load(self, version: Version, make_room: Callable[[int], bool]) -> bool:
        if version.folder == "damaged":
            raise FormatError("It is damaged.")
        assert version.uid not in self.on
        version.form = {"alone": "alone", "front": "pages"}.get(version.folder, "tokens")  # type: ignore[assignment]
        if version.form == "pages":
            if not make_room(2):
                return False
            version.pages, version.in_front, version.bytes = self.pages.take(2), 5, 0
        self.on.add(version.uid)
        return True

    def unload(self, version: Version) -> None:
        self.on.remove(version.uid)


class Books:
    """All that is kept, as the engine keeps it."""

    def __init__(self, count: int = 40, **settings: Any):
        given = {"page_tokens": 4, "max_running": 6, "step_tokens": 24, "max_adapters": 3, "patience": 5.0}
        self.settings = EngineSettings(**{**given, **settings})
        self.pages = Pages(count)
        self.cache = PrefixCache(self.pages, self.settings.page_tokens)
        self.loader = Fake(self.pages)
        self.adapters = Adapters(self.loader, self.pages, self.cache, page_bytes=100)
        self.scheduler = Scheduler(self.settings, self.pages, self.cache, self.adapters)
        self.now = 0.0

    def ask(self, tokens: list[int], more: int, adapter: str | None = None, **others: Any) -> Sequence:
        version = None if adapter is None else self.adapters.find(adapter, others.get("tenant"))
        made = Sequence(tokens, len(tokens) + more, version, arrived=self.now, **others)
        self.scheduler.add(made)
        return made

    def step(self) -> list[Sequence]:
        """Compute a step: each that chooses gets a token; return who had one."""
        self.now += 1
        pieces = self.scheduler.plan(self.now)
        for sequence, error in self.scheduler.refused:
            assert sequence.cached is None or not isinstance(error, BusyError), "what has begun finds its room"
            if not sequence.ended:
                self.scheduler.end(sequence)
        self.scheduler.refused.clear()
        done = []
        for piece in pieces:
            sequence = piece.sequence
            if sequence.ended:
                continue
            self.scheduler.computed(piece)
            if piece.chooses:
                sequence.tokens.append(len(sequence.tokens) % 7)
                done.append(sequence)
                if len(sequence.tokens) >= sequence.limit:
                    self.scheduler.end(sequence)
        return done

    def check(self) -> None:
        """Compare the books with what is there."""
        running, loaded = self.scheduler.running, self.adapters.loaded
        held = Counter(page for sequence in running for page in sequence.pages)
        held.update(node.page for node in self.cache._nodes.values())
        held.update(page for version in loaded for page in version.pages)
        assert held == self.pages._held
        assert sorted([*held, *self.pages._free]) == list(range(1, self.pages.count + 1))
        assert self.pages.paid == sum(version.paid for version in loaded)
        assert self.pages.available >= 0
        assert {version.uid for version in loaded} == self.loader.on
        for version in {s.version for s in (*running, *self.scheduler.waiting.values())} - {None}:
            assert version is not None
            assert version.running == sum(s.version is version for s in running)
            assert version.waiting == sum(s.version is version for s in self.scheduler.waiting.values())
            assert version.is_loaded or not version.running
        assert len({s.version for s in running} - {None}) <= self.settings.max_adapters
        assert len(running) <= self.settings.max_running

    def drain(self) -> None:
        for _ in range(10_000):
            if not (self.scheduler.waiting or self.scheduler.running):
                return
            self.step()
        raise AssertionError("It does not end.")


FOLDERS = ["plain", "plain", "alone", "front", "damaged"]


def act(books: Books, draw: random.Random) -> None:
    """Do one thing at random."""
    names, tenants = [f"a{i}" for i in range(6)], ["x", "y", None]
    name, tenant = draw.choice(names), draw.choice(tenants)
    what = draw.choices(["step", "ask", "cancel", "add", "remove", "pin", "quarantine"], [8, 6, 2, 2, 1, 1, 0.2])[0]
    everyone = [*books.scheduler.running, *books.scheduler.waiting.values()]
    if what == "step":
        books.step()
    elif what == "ask":
        beginning = [draw.randrange(2)] * draw.choice([0, 8, 12])
        tokens = [*beginning, *draw.choices(range(7), k=draw.randrange(1, 20))]
        books.ask(tokens, draw.randrange(1, 12), draw.choice([None, name]), tenant=tenant, priority=draw.randrange(2))
    elif what == "cancel" and everyone:
        books.scheduler.end(draw.choice(everyone), spoiled=draw.random() < 0.3)
    elif what == "add":
        books.adapters.add(name, draw.choice([None, tenant]), draw.choice(FOLDERS), "lora", draw.randrange(1, 900))
    elif what == "remove":
        books.adapters.remove(name, tenant)
    elif what == "pin":
        version = books.adapters.find(name, tenant)
        if not version.pinned and books.adapters.load(version) and draw.random() < 0.3:
            books.scheduler.pin(version)
        else:
            version.pinned = False
    elif what == "quarantine":
        books.adapters.quarantine(books.adapters.find(name, tenant), "So it goes.")


@pytest.mark.parametrize(("seed", "count"), [(0, 40), (1, 40), (2, 16)])
def test_thousands_of_random_operations_lose_nothing(seed: int, count: int) -> None:
    draw, books, seen = random.Random(seed), Books(count), Counter[str]()
    for number in range(5_000):
        try:
            act(books, draw)
        except (BusyError, UnknownAdapterError, UnusableAdapterError) as error:
            seen[type(error).__name__] += 1
        if number % 20 == 0:
            books.check()
    assert books.scheduler.preempted > 5
    assert books.adapters.unloads > 5
    assert seen["UnusableAdapterError"]
    assert seen["BusyError"] or count > 16, "pins are refused"
    books.drain()
    books.check()
    for version in books.adapters.seen_by(None, every=True):
        books.adapters.remove(version.name, version.tenant)
    assert not books.loader.on
    books.cache.forget()
    assert (books.pages.held, books.pages.paid, books.pages.available) == (0, 0, books.pages.count)


def test_prefixes_are_found_by_adapter_version_and_tenant_alone() -> None:
    books = Books()
    books.adapters.add("a", None, "plain", "lora", 10)
    tokens = list(range(13))
    for adapter, tenant in itertools.product((None, "a"), ("x", "y")):
        assert books.ask(tokens, 1, adapter, tenant=tenant).cached is None
        books.drain()
    for adapter, tenant in itertools.product((None, "a"), ("x", "y")):
        again = books.ask([*tokens[:9], 99, 98], 1, adapter, tenant=tenant)
        books.drain()
        assert again.cached == 8
    books.adapters.add("a", None, "plain", "lora", 10)
    fresh = books.ask(tokens, 1, "a", tenant="x")
    books.drain()
    assert fresh.cached == 0
    assert books.ask(tokens, 1, tenant="z").cached is None
    books.drain()


def test_the_last_token_of_a_prompt_is_computed_even_if_all_of_it_is_there() -> None:
    books = Books()
    books.ask(list(range(8)), 1)
    books.drain()
    again = books.ask(list(range(8)), 1)
    books.drain()
    assert again.cached == 4


def test_more_than_fits_gives_way_and_comes_back() -> None:
    books = Books(count=12, prefix_cache=False)
    asked = [books.ask([i] * 8, 24) for i in range(3)]  # 8 pages each at the end
    books.drain()
    assert books.scheduler.preempted
    assert all(len(sequence.tokens) == 32 for sequence in asked)
    assert books.pages.available == 12


def test_the_one_that_waits_longest_is_not_passed_by_for_ever() -> None:
    """A flood for adapters that are active, and one request for another, beyond the cap and without room for it."""
    books = Books(count=30, max_adapters=1)
    books.adapters.add("busy", None, "plain", "lora", 1000)
    books.adapters.add("rare", None, "plain", "lora", 1500)
    books.ask([1] * 6, 6, "busy")
    books.step()
    rare, began = books.ask([2] * 6, 2, "rare"), books.now
    while not rare.ended:
        books.ask([1] * 6, 6, "busy")
        books.step()
        assert books.now - began < 5 + 12 + 4, "patience, those that run, and its own steps"
    assert len(rare.tokens) == 8


def test_tenants_get_alike_however_many_requests_they_send() -> None:
    books = Books(count=400, max_running=4, patience=1e9)
    for _ in range(40):
        books.ask([1] * 4, 8, tenant="many")
    few = [books.ask([2] * 4, 8, tenant="few") for _ in range(6)]
    had = Counter[str | None]()
    while not all(sequence.ended for sequence in few):
        had.update(sequence.tenant for sequence in books.step())
    assert had["few"] == 48
    assert had["many"] <= 48 + 4 * 8


def test_adapters_of_one_tenant_get_alike_however_many_requests_they_have() -> None:
    books = Books(count=400, max_running=4, patience=1e9)
    for name in ("many", "few"):
        books.adapters.now(books.adapters.add(name, "x", "plain", "lora", 10))
    for _ in range(40):
        books.ask([1] * 4, 8, "many", tenant="x")
    few = [books.ask([2] * 4, 8, "few", tenant="x") for _ in range(6)]
    had = Counter[str]()
    while not all(sequence.ended for sequence in few):
        had.update(sequence.version.name for sequence in books.step() if sequence.version is not None)
    assert had["few"] == 48
    assert had["many"] <= 48 + 4 * 8


def test_counters_of_those_that_went_are_given_up_and_change_nothing() -> None:
    class Keeping(Counters):
        """Forgets nobody."""

        def join(self, who: Hashable, others: Collection[Hashable]) -> None:
            least = min((self[other] for other in others), default=None)
            if least is None:
                self._given.clear()
            else:
                self._given[who] = max(self[who], least)

    draw, there, most = random.Random(3), set[int](), 0
    counters, reference = Counters(), Keeping()
    for step in range(20_000):
        who = step if draw.random() < 0.3 else draw.randrange(max(1, step))
        if who not in there and len(there) < 8:
            counters.join(who, there)
            reference.join(who, there)
            there.add(who)
        elif len(there) > 1:
            there.discard(draw.choice(sorted(there)))
        for one in there:
            tokens = draw.random()
            counters.charge(one, tokens)
            reference.charge(one, tokens)
            assert counters[one] == reference[one]
        most = max(most, len(counters))
    assert most < 300 < len(reference)


def test_a_tenant_that_comes_changes_no_turns_of_another_ones_adapters() -> None:
    books = Books(max_running=1)
    for name, tenant in (("a", "x"), ("b", "x"), ("c", "y")):
        books.adapters.add(name, tenant, name, "lora", 100)
    scheduler = books.scheduler
    books.ask([1, 2, 3], 20, "a", tenant="x")
    books.step()
    given = scheduler.by_adapter["x"][scheduler.running[0].root]
    assert given > 0
    books.ask([1], 1, "c", tenant="y")
    assert scheduler.by_adapter["x"][scheduler.running[0].root] == given


def test_adapters_that_are_alone_take_turns_with_the_others() -> None:
    books = Books()
    books.adapters.add("a", None, "alone", "lora", 10)
    books.adapters.add("b", None, "alone", "lora", 10)
    for name in ("a", "b", None):
        books.ask([1, 2], 6, name)
    turns = [books.step() for _ in range(15)]
    lanes = [{s.version.name if s.version else None for s in turn} for turn in turns]
    assert all(len(lane) == 1 for lane in lanes)
    assert [next(iter(lane)) for lane in lanes[:3]] == [next(iter(lane)) for lane in lanes[3:6]]
    assert len({next(iter(lane)) for lane in lanes[:3]}) == 3


def test_priorities_and_order_of_arrival() -> None:
    books = Books(max_running=1)
    low, high = books.ask([1], 1), books.ask([2], 1, priority=1)
    assert books.step() == [high]
    assert books.step() == [low]


def test_what_runs_keeps_its_version() -> None:
    books = Books()
    old = books.adapters.add("a", None, "plain", "lora", 10)
    running = books.ask([1] * 4, 8, "a")
    books.step()
    new = books.adapters.add("a", None, "plain", "lora", 10)
    assert old.is_loaded
    assert running.version is old
    assert books.ask([1] * 4, 1, "a").version is new
    books.drain()
    assert not old.is_loaded
    assert new.number == 2


def test_what_is_pinned_stays_and_leaves_room_or_the_request_is_refused() -> None:
    books = Books(count=10)
    pinned = books.adapters.add("a", None, "plain", "lora", 800)
    books.adapters.now(pinned)
    pinned.pinned = True
    assert not books.adapters.could_hold(None, 3)
    assert books.adapters.could_hold(None, 2)
    other = books.adapters.add("b", None, "plain", "lora", 500)
    with pytest.raises(AdapterlabError, match="no room for the adapter 'b'"):
        books.adapters.now(other)
    stuck = books.ask([1] * 4, 1, "b")
    books.step()
    assert stuck.ended


@pytest.mark.parametrize("begun", [True, False])
def test_a_pin_takes_no_room_that_an_accepted_answer_needs(begun: bool) -> None:
    books = Books(count=10)
    asked = books.ask([1] * 4, 24)  # 7 pages at its end
    if begun:
        books.step()
    large, small = (books.adapters.add(name, None, "plain", "lora", size) for name, size in (("a", 400), ("b", 300)))
    books.adapters.now(large)
    with pytest.raises(BusyError, match="'a' is not pinned: it takes 4 of 10 pages, and 1 of the answers"):
        books.scheduler.pin(large)
    assert not large.pinned
    books.adapters.now(small)
    books.scheduler.pin(small)
    books.drain()
    assert len(asked.tokens) == 28
    assert small.is_loaded
    assert not large.is_loaded, "it made room"
    books.adapters.now(large)
    books.scheduler.pin(large)
    assert large.pinned


def test_prefixes_that_go_on_in_pages_of_the_last_answer_are_not_in_its_way() -> None:
    books = Books(count=7)
    books.ask(list(range(8)), 1)
    last = books.ask(list(range(12)), 16)  # 7 pages at its end, and the other one's prefix of 2 goes on in its third
    books.drain()
    assert len(last.tokens) == 28
    assert not books.scheduler.preempted


def test_an_adapter_that_turns_out_too_large_is_refused_before_the_first_token() -> None:
    books = Books(count=4)
    books.adapters.add("a", None, "front", "lora", 10)
    asked = books.ask([1] * 4, 8, "a")  # 3 pages at its end, and 2 in front
    books.step()
    assert asked.ended
    assert asked.cached is None
