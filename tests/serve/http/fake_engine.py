"""An engine without a model, which answers with the adapter's name, so that tests of the API are fast."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapterlab.errors import BusyError, UnknownAdapterError, UnusableAdapterError
from adapterlab.serve.engine import Engine
from adapterlab.serve.requests import (
    AdapterState,
    EngineSettings,
    Event,
    Finished,
    Handle,
    Request,
    Statistics,
    Token,
)


class FakeEngine(Engine):
    """Answers `NAME LENGTH INDEX`, one character a token: which adapter, how long a prompt, which of n.

    Attributes:
        flowing: cleared, answers stop after their first token until it is set.
        handles: of all requests.
        broken: names of adapters that cannot be served.
        dead: what the engine failed of.
    """

    products = "nothing"

    def __init__(self, tokenizer: Any):
        self.settings, self.tokenizer = EngineSettings(), tokenizer
        self.flowing = threading.Event()
        self.flowing.set()
        self.handles: list[Handle] = []
        self.known: dict[tuple[str | None, str], AdapterState] = {}
        self.broken: dict[str, str] = {}
        self.dead: BaseException | None = None
        self.full = self.draining = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        pass

    @property
    def failure(self) -> BaseException | None:
        return self.dead

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Handle:
        if self.full or self.draining or self.dead:
            raise BusyError("Too many requests are waiting.")
        name = request.adapter or "base"
        if request.adapter and (why := self.broken.get(self.adapter(name, request.tenant).name)):
            raise UnusableAdapterError(why)
        handle = Handle(f"request-{len(self.handles)}", request, on_event)
        self.handles.append(handle)
        for index in range(request.sampling.n):
            text = f"{name.replace('/', '+')} {len(request.prompt)} {index}"
            thread = threading.Thread(target=self._answer, args=(handle, index, text), daemon=True)
            self._threads.append(thread)
            thread.start()
        return handle

    def _answer(self, handle: Handle, index: int, text: str) -> None:
        ids, sampling = self.tokenizer(text)["input_ids"], handle.request.sampling
        said = ids[: sampling.max_tokens]
        counts = {"prompt_tokens": len(handle.request.prompt), "generated_tokens": len(said)}
        for i, id in enumerate(said):
            while i and not self.flowing.wait(0.01) and not handle.cancelled and not self.dead:
                pass
            if handle.cancelled or self.dead:
                break
            logprob = None if sampling.logprobs is None else -0.5
            top = tuple((other, -1.0) for other in range(4, 4 + (sampling.logprobs or 0)))
            handle.put(Token(index, id, self.tokenizer.decode([id]), logprob, top, i == len(said) - 1))
        if self.dead:
            handle.put(Finished(index, "error", error=BusyError("The engine failed. Ask once more.")))
            return
        reason = "cancelled" if handle.cancelled else "length" if len(said) < len(ids) else "stop"
        handle.put(Finished(index, reason, **counts))

    def register(self, name: str, folder: str | Path, tenant: str | None = None, *, pin: bool = False) -> AdapterState:
        before = self.known.get((tenant, name))
        version = before.version + 1 if before else 1
        state = AdapterState(
            name, tenant, version, str(folder), "some", pinned=pin, state="loaded" if pin else "registered"
        )
        self.known[tenant, name] = state
        return state

    def unregister(self, name: str, tenant: str | None = None) -> None:
        if self.known.pop((tenant, name), None) is None:
            raise UnknownAdapterError(f"There is no adapter {name!r}.")

    def pin(self, name: str, tenant: str | None = None, pinned: bool = True) -> AdapterState:
        return self._change(name, tenant, pinned=pinned, state="loaded")

    def warm(self, name: str, tenant: str | None = None) -> AdapterState:
        return self._change(name, tenant, state="loaded")

    def _change(self, name: str, tenant: str | None, **changes: Any) -> AdapterState:
        if (tenant, name) not in self.known:
            raise UnknownAdapterError(f"There is no adapter {name!r}.")
        self.known[tenant, name] = dataclasses.replace(self.known[tenant, name], **changes)
        return self.known[tenant, name]

    def adapter(self, name: str, tenant: str | None = None) -> AdapterState:
        found = self.known.get((tenant, name)) or self.known.get((None, name))
        if found is None:
            raise UnknownAdapterError(f"There is no adapter {name!r}.")
        return found

    def adapters(self, tenant: str | None = None, *, every: bool = False) -> list[AdapterState]:
        return [state for (owner, _), state in sorted(self.known.items(), key=str) if every or owner in (None, tenant)]

    def statistics(self) -> Statistics:
        return Statistics(steps=len(self.handles))

    def drain(self, timeout: float | None = None) -> bool:
        self.draining = True
        for thread in self._threads:
            thread.join(timeout)
        return not any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        for handle in self.handles:
            handle.cancel()
