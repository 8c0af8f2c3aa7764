"""What all routes share: the engine and its successor after a failure, adapters by tenant, prompts, metrics."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adapterlab.errors import AdapterlabError, ConfigError, ServingError, UnknownAdapterError
from adapterlab.serve.engine import Engine
from adapterlab.serve.http.faults import Refusal, refusal_of, unavailable
from adapterlab.serve.http.grammar import Grammars
from adapterlab.serve.http.keys import Caller, Keys
from adapterlab.serve.http.limits import Limits
from adapterlab.serve.http.metrics import Metrics
from adapterlab.serve.http.prompts import Prompts, template_in
from adapterlab.serve.http.shelf import Shelf, checked_name, labelled
from adapterlab.serve.requests import AdapterState, Statistics

log = logging.getLogger("adapterlab.serve")
T = TypeVar("T")
_CALLS = 32  # calls that may wait for the engine's step at the same time
_RESTARTS = 3  # in a row, each within `_SOON` seconds of the one before; then something is wrong with the machine
_SOON = 60.0


@dataclass(frozen=True)
class Registered:
    """How an adapter was registered, to do it again with another engine."""

    folder: Path
    pinned: bool = False


class Service:
    """An engine, and what is known about whoever asks it.

    Attributes:
        base: name of the base model.
        engine: the one that computes now.
        tokenizer: of the base.
        window: tokens that a prompt and its answer may have together, or None.
        shelf: folder of adapters.
        grammars: for answers that keep to a schema.
        keys: of callers; None: whoever reaches the server may do everything.
        limits: on what is asked.
        prompts: makes tokens of what was asked.
        metrics: for Prometheus.
        started: seconds since the epoch.
        draining: no new requests are taken.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        tokenizer: Any,
        *,
        base: str,
        shelf: Shelf,
        grammars: Grammars,
        window: int | None = None,
        keys: Keys | None = None,
        limits: Limits | None = None,
    ):
        """Make the engine and start it.

        Args:
            make: returns an engine that was not started; called again when one has failed.
            tokenizer: of the base.
            base: name of the base model.
            shelf: folder of adapters.
            grammars: for answers that keep to a schema.
            window: of the model.
            keys: of callers.
            limits: default: those of `Limits`.
        """
        self.make, self.tokenizer, self.base, self.shelf, self.window = make, tokenizer, base, shelf, window
        self.grammars, self.keys, self.limits = grammars, keys, limits or Limits()
        self.prompts, self.metrics = Prompts(tokenizer), Metrics(self._statistics)
        self.started, self.draining = int(time.time()), False
        self._registered: dict[tuple[str | None, str], Registered] = {}
        self._templates: dict[tuple[str | None, str], tuple[int, str | None]] = {}
        self._changing = threading.Lock()
        self._text = ThreadPoolExecutor(1, "text")
        self._calls = ThreadPoolExecutor(_CALLS, "engine calls")
        self._changes = ThreadPoolExecutor(1, "changes")
        self.engine = make()
        self.engine.start()

    async def in_text_thread(self, do: Callable[..., T], *args: Any) -> T:
        """Make or read text, beside the event loop and one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._text, do, *args)

    async def call(self, do: Callable[..., T], *args: Any) -> T:
        """Call the engine beside the event loop: its methods may wait for a step."""
        return await asyncio.get_running_loop().run_in_executor(self._calls, do, *args)

    async def change(self, do: Callable[..., T], *args: Any) -> T:
        """Change adapters, one change at a time, so that loading holds no requests up."""
        return await asyncio.get_running_loop().run_in_executor(self._changes, do, *args)

    @property
    def alive(self) -> bool:
        """Whether the engine computes."""
        return self.engine.failure is None

    def check_open(self) -> None:
        """Refuse what comes while nothing can be computed.

        Raises:
            Refusal: 503.
        """
        if self.draining:
            raise unavailable("This server is about to end and takes no more requests.")
        if not self.alive:
            raise unavailable("The engine is being started again. Ask once more in a few seconds.")

    def refusal(self, error: AdapterlabError) -> Refusal:
        """The refusal for an error, without telling where on this machine the adapters lie."""
        if isinstance(error, ServingError) and (self.draining or not self.alive):
            return unavailable("The engine stopped while this was asked of it. Ask once more in a few seconds.")
        found = refusal_of(error)
        found.message = self.told(found.message)
        return found

    def told(self, text: str) -> str:
        """A message without the path of the folder of adapters."""
        return text.replace(f"{self.shelf.root}/", "") if self.shelf.root is not None else text

    def adapter(self, name: str, tenant: str | None) -> AdapterState | None:
        """Find what a request names: an adapter, or None for the base.

        Raises:
            UnknownAdapterError: there is neither for this tenant.
        """
        if name in ("", self.base):
            return None
        try:
            return self.engine.adapter(name, tenant)
        except UnknownAdapterError as error:
            raise UnknownAdapterError(f"{error} The base is {self.base!r}.") from None

    def template(self, state: AdapterState | None) -> str | None:
        """The chat template that an adapter brings.

        Raises:
            FormatError: its file is damaged.
        """
        if state is None:
            return None
        key = (state.tenant, state.name)
        version, found = self._templates.get(key, (0, None))
        if version != state.version:
            found = template_in(Path(state.folder))
            found = found and sys.intern(found)  # adapters of one training bring the same one
            self._templates[key] = state.version, found
        return found

    def register(self, name: str, path: str, tenant: str | None, *, pinned: bool = False) -> AdapterState:
        """Register an adapter from the folder.

        Raises:
            ConfigError: the name is malformed or the base's, there is no such adapter, or there are too many.
            FormatError, UnusableAdapterError, BusyError: as of `Engine.register`.
        """
        if checked_name(name) == self.base:
            raise ConfigError(f"{name!r} is the name of the base. Choose another one for the adapter.")
        folder = self.shelf.place(path, tenant)
        with self._changing:
            if (tenant, name) not in self._registered and len(self._registered) >= self.limits.adapters:
                raise ConfigError(f"{self.limits.adapters:,} adapters are registered, the most (limits.adapters).")
            state = self.engine.register(name, folder, tenant, pin=pinned)
            self._registered[tenant, name] = Registered(folder, pinned)
        return state

    def pin(self, name: str, tenant: str | None, pinned: bool) -> AdapterState:
        """Pin an adapter, or let it go; as `Engine.pin`."""
        with self._changing:
            state = self.engine.pin(name, tenant, pinned)
            self._registered[tenant, name] = Registered(Path(state.folder), pinned)
        return state

    def unregister(self, name: str, tenant: str | None) -> None:
        """Forget an adapter; as `Engine.unregister`."""
        with self._changing:
            self.engine.unregister(name, tenant)
            for known in (self._registered, self._templates):
                known.pop((tenant, name), None)
            self.metrics.forget(labelled(name, tenant))

    def register_found(self, progress: Callable[[int], None] | None = None) -> list[str]:
        """Register what lies in the folder.

        Args:
            progress: called with the number of adapters so far.

        Returns:
            What cannot be served, each with the reason.
        """
        bad = []
        for count, place in enumerate(self.shelf.found(), 1):
            try:
                self.shelf.check(place.folder)
                with self._changing:
                    self.engine.register(place.name, place.folder, place.tenant)
                    self._registered[place.tenant, place.name] = Registered(place.folder)
            except AdapterlabError as error:
                bad.append(f"{place.folder.relative_to(self.shelf.root or '/')}: {error}")
            if progress:
                progress(count)
        return bad

    async def watch(self, every: float = 0.5) -> None:
        """Start another engine when one has failed, until cancelled.

        Raises:
            ServingError: engines fail as soon as they are made.
        """
        failures, last = 0, 0.0
        while True:
            await asyncio.sleep(every)
            if self.alive or self.draining:
                continue
            failures = failures + 1 if time.monotonic() - last < _SOON else 1
            last = time.monotonic()
            if failures > _RESTARTS:
                raise ServingError(f"The engine failed {failures} times in a row; the last time: {self.engine.failure}")
            log.error("the engine failed and is started again: %r", self.engine.failure)
            await self.change(self._restart)

    def _restart(self) -> None:
        self.engine.stop()
        engine = self.make()
        engine.start()
        with self._changing:
            for (tenant, name), was in self._registered.items():
                try:
                    engine.register(name, was.folder, tenant, pin=was.pinned)
                except AdapterlabError as error:
                    log.error("adapter %s is not there any more: %s", name, error)
            self._templates.clear()  # versions begin anew
            self.engine = engine

    def close(self) -> None:
        """Finish what runs, as long as the limits allow, and stop."""
        self.draining = True
        if self.alive and not self.engine.drain(self.limits.drain_seconds):
            log.warning("requests were cancelled: they took longer than limits.drain_seconds")
        self.engine.stop()
        for pool in (self._text, self._calls, self._changes):
            pool.shutdown(wait=False, cancel_futures=True)

    def caller(self, key: str | None) -> Caller | None:
        """Say whose key it is; None: nobody's."""
        if self.keys is None:
            return Caller()
        return self.keys.holder(key) if key else None

    def _statistics(self) -> Statistics:
        return self.engine.statistics() if self.alive else Statistics()
