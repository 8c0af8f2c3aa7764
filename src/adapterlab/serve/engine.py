"""The engine: requests for a base model and any of its adapters, computed together, step by step.

    with Engine(model, tokenizer) as engine:
        engine.register("sums", "runs/sums/best")
        handle = engine.submit(Request(prompt=(1, 2, 3), adapter="sums", sampling=Sampling(temperature=0)))
        for event in handle: ...

One thread computes; it alone touches the model. All methods may be called from any thread: what changes the engine is
handed to that thread and done between two steps, so calls wait for the step that runs, and no longer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from adapterlab.serve.requests import AdapterState, EngineSettings, Event, Handle, Request, Statistics


class Engine:
    """Serves one base model and the adapters that are registered with it.

    The model belongs to the engine from `start` to `stop`: nobody else may call it or change what is attached to it.

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

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine's thread, if something did; all requests ended with it, and new ones are refused.

        What goes wrong with one request or adapter ends that alone, and is not seen here.
        """

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Handle:
        """Queue a request; its first step comes when there is room.

        Args:
            request: see `Request`. The version of its adapter is chosen now: what is registered later under the same
                name serves later requests alone.
            on_event: is called with each event on the engine's thread and must return at once, without an error (for
                example `loop.call_soon_threadsafe(queue.put_nowait, event)`); default: events wait in the handle.

        Returns:
            The handle; with `on_event`, to cancel only.

        Raises:
            ConfigError: the prompt is empty, has ids that the model has not, or prompt and answer are longer than the
                model's window or than all pages; or a stop text is given without a tokenizer.
            UnknownAdapterError: no adapter of this name is registered for this tenant.
            UnusableAdapterError: the adapter is quarantined; the message has the reason.
            BusyError: too many requests are waiting, or the engine drains, is stopped or has failed.
        """
        raise NotImplementedError

    def register(self, name: str, folder: str | Path, tenant: str | None = None, *, pin: bool = False) -> AdapterState:
        """Make an adapter known; its files are looked at, and its tensors read when the first request needs them.

        A name that is registered already gets a new version: requests that were submitted keep the old one, which is
        unloaded when the last of them has ended. The files have to stay as they are until the adapter is unregistered
        or registered anew.

        Args:
            name: for requests.
            folder: of the adapter, one of ours or of HF PEFT.
            tenant: who may use it; None: everybody. Each tenant has names of its own, which hide everybody's.
            pin: load it now and keep it loaded.

        Raises:
            FormatError: the folder is damaged, foreign, or for another base.
            UnusableAdapterError: it cannot be served, with the reason; known only after loading if `pin` is not set.
            BusyError: pinned adapters leave no room for it; or the engine is stopped or has failed.
        """
        raise NotImplementedError

    def unregister(self, name: str, tenant: str | None = None) -> None:
        """Forget an adapter; requests that were submitted are computed to their end.

        Raises:
            UnknownAdapterError: there is none of this name for exactly this tenant.
        """

    def pin(self, name: str, tenant: str | None = None, pinned: bool = True) -> AdapterState:
        """Load an adapter now and never unload it, or let it be unloaded again.

        Raises:
            UnknownAdapterError: there is none of this name for exactly this tenant.
            UnusableAdapterError: it cannot be loaded or served, with the reason.
            BusyError: pinned and running adapters leave no room for it.
        """
        raise NotImplementedError

    def warm(self, name: str, tenant: str | None = None) -> AdapterState:
        """Load an adapter now, so that its next request need not wait; it may be unloaded again.

        Raises:
            UnknownAdapterError, UnusableAdapterError, BusyError: as for `pin`.
        """
        raise NotImplementedError

    def adapter(self, name: str, tenant: str | None = None) -> AdapterState:
        """Return the adapter that a request of this tenant would get under a name.

        Raises:
            UnknownAdapterError: there is none.
        """
        raise NotImplementedError

    def adapters(self, tenant: str | None = None, *, every: bool = False) -> list[AdapterState]:
        """Return the adapters that a tenant sees, by name; with `every`, those of all tenants."""
        raise NotImplementedError

    def statistics(self) -> Statistics:
        """Return counts; never waits longer than a step."""
        raise NotImplementedError

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait until all that were submitted have ended.

        Returns:
            Whether they have, in `timeout` seconds.
        """
        raise NotImplementedError

    def stop(self) -> None:
        """End the thread after its step; requests that have not ended are cancelled. May be called again."""
