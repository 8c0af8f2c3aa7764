"""The engine: requests for a base model and any of its adapters, computed together, step by step.

    with Engine(model, tokenizer) as engine:
        engine.register("sums", "runs/sums/best")
        handle = engine.submit(Request(prompt=(1, 2, 3), adapter="sums", sampling=Sampling(temperature=0)))
        for event in handle: ...

One thread computes; it alone touches the model. All methods may be called from any thread: what changes the engine is
handed to that thread and done between two steps, so calls wait for the step that runs, and no longer.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from adapterlab.engine.modes import dropout_off
from adapterlab.errors import AdapterlabError, BusyError, ConfigError, ServingError
from adapterlab.hosts import host
from adapterlab.io.folder import TENSORS, read_info
from adapterlab.paths import user_path
from adapterlab.serve.adapters import Version
from adapterlab.serve.requests import AdapterState, EngineSettings, Event, Handle, Request, Statistics
from adapterlab.serve.worker import Worker

T = TypeVar("T")
_LOOK = 1.0  # seconds after which a thread without work looks around


class Engine:
    """Serves one base model and the adapters that are registered with it.

    The model belongs to the engine from when it is made until `stop`: nobody else may call it or change what is
    attached to it. Requests without an adapter get the plain base, whatever the model carries.

    Attributes:
        settings: see `EngineSettings`.
    """

    def __init__(self, model: Any, tokenizer: Any = None, settings: EngineSettings | None = None):
        """Prepare to serve a model, in evaluation mode.

        Args:
            model: a causal language model of transformers, whose attention goes through the interface of transformers.
            tokenizer: needed for texts: stop texts, and the text of tokens.
            settings: default: those of `EngineSettings`.

        Raises:
            ModelError: the model cannot be served so, with the reason.
        """
        self.settings = settings or EngineSettings()
        self.model = model
        self._changed = threading.Condition(threading.RLock())  # guards all below; told of everything that is new
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._closing, self._draining = False, False
        self._ids = itertools.count(1)
        carrier = host(model)
        self._before = None if carrier is None else carrier.live
        if carrier is not None:
            carrier.activate()
        with dropout_off(model), torch.no_grad():
            self._worker = Worker(model, tokenizer, self.settings)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the thread; once.

        Raises:
            ServingError: it was started before.
        """
        with self._changed:
            if self._thread is not None or self._closing:
                raise ServingError("The engine was started before. Make another one.")
            self._thread = threading.Thread(target=self._live, name="adapterlab-engine", daemon=True)
            self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine's thread, if something did; all requests ended with it, and new ones are refused.

        What goes wrong with one request or adapter ends that alone, and is not seen here.
        """
        return self._failure

    @property
    def products(self) -> str:
        """How updates of several adapters are computed, in words."""
        return self._worker.products

    # ------------------------------------------------------------------ requests

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Handle:
        """Queue a request; its first step comes when there is room.

        Args:
            request: see `Request`. The version of its adapter is chosen now: what is registered later under the same
                name serves later requests alone.
            on_event: is called with each event on the engine's thread and must return at once (for example
                `loop.call_soon_threadsafe(queue.put_nowait, event)`); an error cancels the request. Default: events
                wait in the handle.

        Returns:
            The handle; with `on_event`, to cancel only.

        Raises:
            ConfigError: the prompt is empty, has ids that the model has not, or prompt and answer are longer than the
                model's window or than all pages; or a stop text is given without a tokenizer.
            UnknownAdapterError: no adapter of this name is registered for this tenant.
            UnusableAdapterError: the adapter is quarantined; the message has the reason.
            BusyError: too many requests are waiting, or the engine drains, is stopped or has failed.
        """
        handle = Handle(f"request-{next(self._ids)}", request, on_event)
        with self._changed:
            self._check_open()
            if self._draining:
                raise BusyError("The engine drains: it takes no new requests.")
            self._worker.add(handle)
            self._changed.notify_all()
        return handle

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait until all that were submitted have ended.

        Returns:
            Whether they have, in `timeout` seconds.
        """
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: self._worker.is_idle, timeout)

    # ------------------------------------------------------------------ adapters

    def register(self, name: str, folder: str | Path, tenant: str | None = None, *, pin: bool = False) -> AdapterState:
        """Make an adapter known; its files are looked at, and its tensors read when the first request needs them.

        A name that is registered already gets a new version: requests that were submitted keep the old one, which is
        unloaded when the last of them has ended. The files have to stay as they are until the adapter is unregistered
        or registered anew.

        Args:
            name: for requests.
            folder: of the adapter, one of ours or of HF PEFT.
            tenant: who may use it; None: everybody. Each tenant has names of its own, which hide everybody's.
            pin: load it now and keep it loaded; where that fails, the name means what it did before.

        Raises:
            FormatError: the folder is damaged, foreign, or for another base.
            UnusableAdapterError: it cannot be served, with the reason; known only after loading if `pin` is not set.
            BusyError: as for `pin`; or the engine is stopped or has failed.
        """
        place = user_path(folder).resolve()
        info = read_info(place)
        if not name:
            raise ConfigError("An adapter needs a name, for requests to say.")
        file = place / TENSORS
        size = file.stat().st_size if file.is_file() else 0

        def add() -> AdapterState:
            adapters = self._worker.adapters
            before = adapters.named(name, tenant)
            kept = before is not None and before.pinned
            version = adapters.add(name, tenant, str(place), info.method, size)
            if not pin:
                return version.shown()
            try:
                return self._pinned(version)
            except AdapterlabError:
                adapters.take_back(version, before)
                if before is not None and kept:
                    self._pinned(before)
                raise

        return self._between_steps(add)

    def unregister(self, name: str, tenant: str | None = None) -> None:
        """Forget an adapter; requests that were submitted are computed to their end.

        Raises:
            UnknownAdapterError: there is none of this name for exactly this tenant.
        """
        self._between_steps(lambda: self._worker.remove(name, tenant))

    def pin(self, name: str, tenant: str | None = None, pinned: bool = True) -> AdapterState:
        """Load an adapter now and never unload it, or let it be unloaded again.

        Raises:
            UnknownAdapterError: there is none of this name for exactly this tenant.
            UnusableAdapterError: it cannot be loaded or served, with the reason.
            BusyError: pinned and running adapters leave no room for it, or accepted answers need that for their end.
        """

        def change() -> AdapterState:
            version = self._worker.adapters.own(name, tenant)
            if pinned:
                return self._pinned(version)
            version.pinned = False
            return version.shown()

        return self._between_steps(change)

    def warm(self, name: str, tenant: str | None = None) -> AdapterState:
        """Load an adapter now, so that its next request need not wait; it may be unloaded again.

        Raises:
            UnknownAdapterError, UnusableAdapterError, BusyError: as for `pin`.
        """

        def load() -> AdapterState:
            version = self._worker.adapters.own(name, tenant)
            self._worker.adapters.now(version)
            return version.shown()

        return self._between_steps(load)

    def adapter(self, name: str, tenant: str | None = None) -> AdapterState:
        """Return the adapter that a request of this tenant would get under a name.

        Raises:
            UnknownAdapterError: there is none.
        """
        with self._changed:
            return self._worker.adapters.find(name, tenant).shown()

    def adapters(self, tenant: str | None = None, *, every: bool = False) -> list[AdapterState]:
        """Return the adapters that a tenant sees, by name; with `every`, those of all tenants."""
        with self._changed:
            return [version.shown() for version in self._worker.adapters.seen_by(tenant, every=every)]

    def statistics(self) -> Statistics:
        """Return counts; never waits longer than a step."""
        with self._changed:
            return self._worker.statistics()

    def _pinned(self, version: Version) -> AdapterState:
        self._worker.pin(version)
        return version.shown()

    # ------------------------------------------------------------------ the thread

    def stop(self) -> None:
        """End the thread after its step; requests that have not ended are cancelled. May be called again."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        elif self._thread is None:
            self._close()

    def _close(self) -> None:
        """Leave the model as it was."""
        with self._changed, torch.no_grad():
            for _, waiting in self._calls:
                waiting.set_exception(BusyError("The engine is stopped."))
            self._calls.clear()
            if self._worker.forward.pools:
                self._worker.close()
            carrier = host(self.model)
            if carrier is not None and self._before is not None:
                carrier.activate(*self._before)
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise BusyError(f"The engine has failed: {self._failure}. Start it again.")
        if self._closing:
            raise BusyError("The engine is stopped.")

    def _between_steps(self, call: Callable[[], T]) -> T:
        """Let the engine's thread do something when no step runs; before the start, do it here."""
        with self._changed:
            self._check_open()
            if self._thread is None or self._thread is threading.current_thread():
                with torch.no_grad(), dropout_off(self.model):
                    return call()
            future: Future[T] = Future()
            self._calls.append((call, future))
            self._changed.notify_all()
        return future.result()

    def _live(self) -> None:
        """Compute until the end; what goes wrong here ends everything, and is told to all who wait."""
        try:
            with dropout_off(self.model), torch.no_grad():
                while not self._closing:
                    self._turn()
        except BaseException as error:
            self._failure = error
            with self._changed:
                self._worker.end_all(ServingError(f"The engine has failed: {type(error).__name__}: {error}"))
        finally:
            self._closing = True
            self._close()

    def _turn(self) -> None:
        """Do what was called for, then a step; wait where there is none."""
        with self._changed:
            while self._calls:
                call, future = self._calls.popleft()
                try:
                    future.set_result(call())
                except Exception as error:
                    future.set_exception(error)
            pieces = self._worker.plan()
            if not pieces:
                self._changed.notify_all()
                if not (self._calls or self._closing):
                    self._changed.wait(_LOOK)
                return
        done = self._worker.compute(pieces)
        with self._changed:
            self._worker.apply(done)
