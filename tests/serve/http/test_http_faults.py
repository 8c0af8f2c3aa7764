"""Clients that vanish, dawdle or lie, an engine that fails, a server that ends."""

from __future__ import annotations

import json
import logging
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from http_servers import ASK, Server, ask, post  # noqa: E402

from adapterlab.serve.http import gate, keys  # noqa: E402


@pytest.fixture
def own(make_server: Callable[..., Server]) -> Iterator[Server]:
    """A server that a test may break."""
    made = make_server()
    yield made
    made.stop()


def sent(server: Server, body: Any, *, path: str = "/v1/completions") -> socket.socket:
    """Send a request and return the connection."""
    place = urlsplit(server.url)
    connection = socket.create_connection((place.hostname or "", place.port or 0), timeout=10)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def until(what: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_what_nobody_waits_for_is_cancelled(own: Server, stream: bool) -> None:
    own.engine.flowing.clear()
    connection = sent(own, {"prompt": ["1", "2"], "stream": stream})
    until(lambda: len(own.engine.handles) == 2)
    assert not any(handle.cancelled for handle in own.engine.handles)
    connection.close()
    until(lambda: all(handle.cancelled for handle in own.engine.handles))


def test_a_client_that_does_not_read_holds_nobody_up(own: Server) -> None:
    idle = [sent(own, {"prompt": "1", "stream": True, "n": 16}) for _ in range(8)]
    assert post(own, "/v1/completions", {"prompt": "1"})[0] == 200
    for connection in idle:
        connection.close()


def test_a_client_that_does_not_send_what_it_promised_is_cut_off(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_GRACE", 0.1)
    server = make_server(seconds=0.2)
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname or "", place.port or 0), timeout=5) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        assert b" 504 " in connection.recv(4096)
    assert not server.engine.handles
    server.stop()


def test_what_takes_too_long_ends(make_server: Callable[..., Server]) -> None:
    server = make_server(seconds=0.2)
    server.engine.flowing.clear()
    status, found, _ = post(server, "/v1/completions", {"prompt": "1"})
    assert (status, found["error"]["code"]) == (504, "timeout")
    with pytest.raises(openai.APIError, match=r"limits\.seconds"):
        list(server.openai().completions.create(model="base", prompt="1", stream=True))
    until(lambda: all(handle.cancelled for handle in server.engine.handles))
    server.stop()


def test_a_full_queue_and_a_failed_engine_ask_to_come_again(own: Server) -> None:
    own.engine.full = True
    status, found, headers = post(own, "/v1/completions", {"prompt": "1"})
    assert (status, found["error"]["code"], headers["Retry-After"]) == (429, "busy", "1")
    own.engine.full = False
    ask(own, "PUT", "/v1/adapters/kept", {"path": "sums", "pinned": True})
    failed = own.engine
    with own.service._changing:  # the next engine waits for it
        failed.dead = RuntimeError("out of pages")
        status, found, headers = post(own, "/v1/completions", {"prompt": "1"})
        assert (status, headers["Retry-After"]) == (503, "1")
        assert ask(own, "GET", "/health")[0] == ask(own, "GET", "/ready")[0] == 503
    until(lambda: own.service.engine is not failed)
    assert post(own, "/v1/completions", {"prompt": "1", "model": "kept"})[1]["choices"][0]["text"] == "kept 1 0"
    assert own.engine.adapter("kept").pinned


def test_every_error_is_one_that_openais_client_knows(make_server: Callable[..., Server], tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = keys.add(file, "user", ["infer"])
    server = make_server(file, body_bytes=2000, seconds=0.3)

    def error(key: str = key, **body: Any) -> Any:
        with pytest.raises(openai.APIStatusError) as caught:
            server.openai(key).completions.create(**{"model": "base", "prompt": "1", **body})
        return caught.value

    def fails(*_: Any) -> None:
        raise ZeroDivisionError("a secret")

    found = error(temperature="warm")
    assert (type(found), found.param, found.type) == (
        openai.BadRequestError, "temperature", "invalid_request_error"
    )  # fmt: skip
    found = error("nobody's")
    assert (type(found), found.code) == (openai.AuthenticationError, "invalid_api_key")
    with pytest.raises(openai.PermissionDeniedError) as caught:
        server.openai(key).post("/load_lora_adapter", cast_to=object, body={})
    assert caught.value.code == "scope_missing"
    found = error(model="nowhere")
    assert (type(found), found.code, found.param) == (openai.NotFoundError, "model_not_found", "model")
    found = error(prompt="1" * 3000)
    assert (found.status_code, found.type) == (413, "invalid_request_error")
    server.engine.full = True
    found = error()
    assert (type(found), found.code, found.type) == (openai.RateLimitError, "busy", "rate_limit_error")
    server.engine.full = False
    server.engine.flowing.clear()
    found = error()
    assert (type(found), found.status_code, found.code) == (openai.InternalServerError, 504, "timeout")
    server.engine.flowing.set()
    server.engine.submit = fails  # type: ignore[method-assign]
    found = error()
    assert (type(found), found.code, "secret" in str(found)) == (openai.InternalServerError, "internal", False)
    with server.service._changing:
        server.engine.dead = RuntimeError("out of pages")
        found = error()
        assert (found.status_code, found.code, found.type) == (503, "unavailable", "server_error")
    server.stop()


def test_streams_that_run_when_the_engine_fails_say_so(own: Server) -> None:
    own.engine.flowing.clear()
    stream = own.openai().completions.create(model="base", prompt="1", stream=True)
    next(iter(stream))
    own.engine.dead = RuntimeError("out of pages")
    with pytest.raises(openai.APIError, match="Ask once more"):
        list(stream)


def test_a_server_that_is_asked_to_end_finishes_what_runs(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.engine.flowing.clear()
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(post(server, "/v1/completions", {"prompt": "1"})))
    asking.start()
    until(lambda: server.engine.handles)
    server.uvicorn.should_exit = True
    time.sleep(0.3)
    assert server.thread.is_alive()
    server.stop()
    asking.join(60)
    assert answers[0][0] == 200
    assert answers[0][1]["choices"][0]["text"] == "base 1 0"


def test_bodies_that_are_too_large_are_refused(make_server: Callable[..., Server]) -> None:
    server = make_server(body_bytes=1000)
    status, found, _ = post(server, "/v1/completions", {"prompt": "1" * 2000})
    assert (status, "limits.body_bytes" in found["error"]["message"]) == (413, True)
    place = urlsplit(server.url)
    connection = socket.create_connection((place.hostname or "", place.port or 0), timeout=10)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
    for _ in range(3):
        connection.sendall(b"200\r\n" + b"1" * 512 + b"\r\n")
    assert b" 413 " in connection.recv(4096)
    server.stop()


def test_logs_hold_nothing_of_what_was_said(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "mysecretprompt"
    for body in (
        {"prompt": secret},
        {"prompt": secret, "stream": True},
        {"prompt": secret, "temperature": secret},
        {secret: secret},
        {"prompt": secret, "model": "nowhere"},
    ):
        post(server, "/v1/completions", body)
    post(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": secret, "tool_calls": [{}]}]})
    post(server, "/generate_stream", {"inputs": secret, "parameters": {secret: secret}})
    ours = [record for record in caplog.records if record.name.split(".")[0] in ("adapterlab", "uvicorn", "fastapi")]
    assert any("/v1/completions" in record.getMessage() for record in ours)
    assert not any(secret in record.getMessage() or record.exc_info for record in ours)


def test_counts_go_to_prometheus(server: Server) -> None:
    def count() -> float:
        text = ask(server, "GET", "/metrics")[1]
        found = re.search(r'^adapterlab_generated_tokens_total\{adapter="sums"\} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0

    before = count()
    post(server, "/v1/completions", {"prompt": "1", "model": "sums"})
    text = ask(server, "GET", "/metrics")[1]
    assert count() - before == len("sums 1 0")
    for name in (
        "adapterlab_first_token_seconds_bucket",
        "adapterlab_engine_steps_total",
        "adapterlab_engine_pages_used",
    ):
        assert re.search(f"^{name}", text, re.MULTILINE)


def test_counts_of_names_that_come_and_go_do_not_add_up(server: Server) -> None:
    for name in ("gone/1", "gone/2"):
        ask(server, "PUT", f"/v1/adapters/{name}", {"path": "sums"})
        assert post(server, "/v1/completions", {"prompt": "1", "model": name})[0] == 200
        assert f'adapter="{name}"' in ask(server, "GET", "/metrics")[1]
        ask(server, "DELETE", f"/v1/adapters/{name}")
    assert "gone/" not in ask(server, "GET", "/metrics")[1]


VALUES = (
    None, True, -1, 0, 2**63, 1e308, "", "x" * 5000, "\ud800", "\0", [], {}, [[]], [None], [[1, 2], "x"], {"a": {}},
    [2**40], [-1], {"role": "user"}, [{"role": "user", "content": None}], [{"role": "assistant", "tool_calls": [1]}],
    [{"type": "function", "function": {"name": "{{ 1/0 }}"}}], {"type": "json_schema", "json_schema": {"schema": {}}},
)  # fmt: skip
FIELDS = (
    "model", "adapter_id", "messages", "prompt", "max_tokens", "n", "stream", "stream_options", "temperature", "top_p",
    "seed", "stop", "logit_bias", "response_format", "tools", "tool_choice", "chat_template_kwargs", "logprobs",
    "top_logprobs", "stop_token_ids", "metadata", "__class__", "lora_name", "lora_path", "path", "warm", "pinned",
    "inputs", "parameters",
)  # fmt: skip
PLACES = (
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"), ("POST", "/generate"), ("POST", "/generate_stream"),
    ("PUT", "/v1/adapters/x"), ("GET", "/v1/models/%00"),
    ("GET", "/v1/adapters/.."),
    ("DELETE", "/v1/adapters/%2e%2e"), ("PATCH", "/v1/models"), ("GET", "/nowhere"),
)  # fmt: skip


def test_a_hundred_hostile_requests_get_an_answer_each(own: Server) -> None:
    draw = random.Random(0)
    seen = set()
    for _ in range(150):
        method, path = draw.choice(PLACES)
        start = draw.choice(({}, {"messages": ASK}, {"prompt": "1"}, {"inputs": "1"}))
        body = {**start, **{draw.choice(FIELDS): draw.choice(VALUES) for _ in range(draw.randint(1, 4))}}
        text = json.dumps(body).encode()
        if draw.random() < 0.2:
            text = bytes(draw.randrange(256) if draw.random() < 0.05 else byte for byte in text)
        status, found, _ = ask(own, method, path, None if method == "GET" else text)
        assert status < 500, (method, path, body, found)
        seen.add(status)
    assert {400, 404, 405} <= seen
    assert post(own, "/v1/completions", {"prompt": "1"})[0] == 200
    until(lambda: not any(thread.is_alive() for thread in own.engine._threads))
