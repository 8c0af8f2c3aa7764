"""Talk to a server of adapters from the command line, with nothing but Python's own library."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

from adapterlab.errors import ConfigError, ServingError, nearest
from adapterlab.json_text import parsed

KEY = "ADAPTERLAB_KEY"
_ERROR = 1 << 16  # bytes of an error that are read


class Client:
    """A server, by its address.

    Attributes:
        url: such as `http://127.0.0.1:8000`.
        key: sent with each request; default: the environment variable `ADAPTERLAB_KEY`.
        timeout: seconds without a sign of life after which it is given up.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 600):
        if urlsplit(url).scheme not in ("http", "https"):
            raise ConfigError(f"{url!r} is no address of a server. Write it as http://127.0.0.1:8000.")
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self.key = key or os.environ.get(KEY)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request and return the answer, read as JSON.

        Raises:
            ServingError: the server refuses it, with its reason; or nothing answers.
        """
        with self._opened(method, path, body) as response:
            return _read(response.read())

    def stream(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """Send a request and yield the server-sent events of its answer.

        Raises:
            ServingError: the server refuses it, or breaks off.
        """
        with self._opened("POST", path, body) as response:
            for line in response:
                kind, _, data = line.partition(b":")
                if kind != b"data":
                    continue
                if data.strip() == b"[DONE]":
                    return
                event = _read(data)
                if "error" in event:
                    raise ServingError(str(event["error"].get("message")))
                yield event
        raise ServingError(f"{self.url} broke off in the middle of an answer. Its log says why.")

    def models(self) -> list[dict[str, Any]]:
        """The base, and the adapters that one sees."""
        return list(self.ask("GET", "/v1/models")["data"])

    def adapters(self) -> list[dict[str, Any]]:
        """The adapters that one sees."""
        return list(self.ask("GET", "/v1/adapters")["data"])

    def put(self, name: str, **wishes: Any) -> dict[str, Any]:
        """Load, replace, warm or pin an adapter; see `PUT /v1/adapters` in docs/serving.md."""
        return dict(self.ask("PUT", f"/v1/adapters/{quote(name)}", wishes))

    def delete(self, name: str) -> None:
        """Unload an adapter."""
        self.ask("DELETE", f"/v1/adapters/{quote(name)}")

    def _opened(self, method: str, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            raise ServingError(_reason(error)) from None
        except (OSError, ValueError) as error:
            what = getattr(error, "reason", error)
            raise ServingError(f"{self.url} does not answer: {what}. Start a server: adapterlab serve MODEL.") from None


def _read(text: bytes) -> Any:
    try:
        return parsed(text.decode())
    except ValueError as error:
        raise ServingError(f"The server's answer is no JSON ({error}). Is it one of OpenAI's kind?") from None


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(parsed(error.read(_ERROR).decode())["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"The server refuses this with status {error.code} ({error.reason})."


class RemoteConversation:
    """A conversation with a model or an adapter of a server; as `Conversation` for models in this process.

    Attributes:
        system: system message, or None.
        turns: so far.
        methods: names of the adapters there.
        active: the one that answers; () for the base.
    """

    def __init__(
        self, client: Client, model: str, system: str | None, max_new_tokens: int, temperature: float, seed: int
    ):
        self.client, self.system = client, system
        self.settings = {"max_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        self.turns: list[dict[str, str]] = []
        self.active: tuple[str, ...] = ()
        self._look()
        self.activate(*([model] if model != self.base else []))

    def activate(self, *names: str) -> None:
        """Let another adapter answer; none: the base.

        Raises:
            ServingError: the server has none of this name.
            ConfigError: several were named.
        """
        if len(names) > 1:
            raise ConfigError(f"A server answers with one adapter at a time, and {len(names)} were named.")
        for name in names:
            if name not in (self.base, *self.methods):
                self._look()  # it may have come since
            if name not in (self.base, *self.methods):
                raise ServingError(f"The server has no {name!r}. {nearest(name, [self.base, *self.methods])}")
        self.active = names

    def _look(self) -> None:
        """Ask what is there; not all servers tell of single models."""
        self.base, *names = [str(one["id"]) for one in self.client.models()]
        self.methods: dict[str, None] = dict.fromkeys(names)

    def say(self, text: str, show: Any) -> None:
        """Put a question and pass the answer on as it comes; an interrupted one is kept as far as it came."""
        asked = [*self.turns, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {"model": self.active[0] if self.active else self.base, "messages": [*system, *asked], "stream": True}
        pieces: list[str] = []
        try:
            for event in self.client.stream("/v1/chat/completions", {**body, **self.settings}):
                for choice in event["choices"]:
                    pieces.append(choice["delta"].get("content") or "")
                    show(pieces[-1])
        finally:
            if pieces:
                self.turns = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def reset(self) -> None:
        """Forget all turns."""
        self.turns = []
