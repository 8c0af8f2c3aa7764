"""Several servers behind a router: what they announce, and that one may vanish or be asked to end."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from http_servers import Server, ask, post  # noqa: E402
from test_http_faults import until  # noqa: E402

import adapterlab as al  # noqa: E402
from adapterlab.errors import ConfigError, OutputError  # noqa: E402
from adapterlab.serve.http import announcing  # noqa: E402
from adapterlab.serve.http.announcing import Announcer, address  # noqa: E402
from adapterlab.serve.http.server import listener, place_of  # noqa: E402

ROUTER = Path(__file__).parents[3] / "examples" / "router.py"
NAMES = [f"a{i}" for i in range(32)]


@pytest.fixture(scope="module")
def router() -> ModuleType:
    spec = importlib.util.spec_from_file_location("router", ROUTER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(url: str, *, running: int = 0) -> dict[str, Any]:
    return {"url": url, "base": "base", "load": {"running": running, "waiting": 0}}


def test_an_adapter_has_a_home_and_a_server_that_goes_moves_its_own_share(router: ModuleType) -> None:
    servers = [said(f"http://h{i}:1") for i in range(5)]
    homes = {name: router.ordered(servers, name)[0]["url"] for name in map(str, range(1000))}
    counts = {url: list(homes.values()).count(url) for url in homes.values()}
    assert len(counts) == 5
    assert min(counts.values()) > 150
    fewer = [one for one in servers if one["url"] != "http://h2:1"]
    moved = {name for name, url in homes.items() if router.ordered(fewer, name)[0]["url"] != url}
    assert moved == {name for name, url in homes.items() if url == "http://h2:1"}
    name = next(name for name, url in homes.items() if url == "http://h0:1")
    assert router.ordered([said("http://h0:1", running=60), *servers[1:]], name)[-1]["url"] == "http://h0:1"
    assert router.ordered([said("http://h0:1", running=1), *servers[1:]], "base")[-1]["url"] == "http://h0:1"
    assert router.ordered([], "x") == []


def test_a_router_reads_the_name_wherever_it_is(router: ModuleType) -> None:
    bodies = ({"model": "x"}, {"model": "base", "adapter_id": "x"}, {"parameters": {"adapter_id": "x"}})
    assert [router.named(json.dumps(body).encode()) for body in bodies] == ["x"] * 3
    assert [router.named(body) for body in (b"", b"[]", b"{", b'{"parameters": 1}')] == [""] * 4


def test_what_is_announced_holds_for_a_time_and_is_taken_back(
    server: Server, router: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "one.json"
    announcer = Announcer(file, server.url, server.service)
    ask(server, "PUT", "/v1/adapters/sums", {"warm": True})
    announcer.tell()
    (found,) = router.live(tmp_path)
    assert (found["url"], found["base"], found["ready"], found["loaded"]) == (server.url, "base", True, ["sums"])
    assert found["adapters"] == len(server.engine.known)
    assert 0 < found["until"] - time.time() < 10
    file.write_text(json.dumps({**found, "until": time.time() - 1}))
    assert router.live(tmp_path) == []
    file.write_text("{")
    assert router.live(tmp_path) == []
    try:
        announcer.leave()
        assert not list(tmp_path.iterdir())
    finally:
        server.service.draining = False


def test_announcements_are_sent_too_and_a_place_that_fails_harms_nobody(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    came: list[Any] = []

    class Catch(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Catch) as there:
        threading.Thread(target=there.serve_forever, daemon=True).start()
        announcer = Announcer(f"http://127.0.0.1:{there.server_port}/", server.url, server.service)
        announcer.tell()
        announcer.leave()
        server.service.draining = False
        there.shutdown()
    assert [(one["url"], one["ready"]) for one in came] == [(server.url, True), (server.url, False)]
    caplog.set_level(logging.WARNING)
    announcer.tell()  # nobody is there any more
    announcer.tell()

    def full(*_: Any) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(announcing, "write_json", full)
    Announcer(tmp_path / "x.json", server.url, server.service).tell()
    assert [r.getMessage().partition(": ")[0] for r in caplog.records] == ["this server could not be announced"] * 2
    assert post(server, "/v1/completions", {"prompt": "1"})[0] == 200


def test_addresses_and_places(tmp_path: Path) -> None:
    assert address("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert address("::1", 1) == "http://[::1]:1"
    assert "0.0.0.0" not in address("0.0.0.0", 8000)
    assert place_of("http://x/y") == "http://x/y"
    assert place_of(str(tmp_path / "x.json")) == tmp_path / "x.json"
    for wrong in (tmp_path, tmp_path / "no" / "x.json"):
        with pytest.raises(ConfigError, match="no place for a file"):
            place_of(str(wrong))
    taken = listener("127.0.0.1", 0)
    taken.listen()
    with pytest.raises(ConfigError, match="--port"):
        listener("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="--host"):
        listener("192.0.2.1", 0)
    taken.close()


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Two servers of a tiny model and the same adapters, by their addresses."""
    from transformers import AutoModelForCausalLM

    from tiny_folder import write_model

    model = write_model(tmp_path / "model")
    host = al.attach(AutoModelForCausalLM.from_pretrained(model), al.LoRA(r=2), "a")
    for name in NAMES:
        host.save(tmp_path / "adapters" / name, "a")
    (tmp_path / "live").mkdir()
    command = [sys.executable, "-m", "adapterlab", "serve", model, "--adapters", tmp_path / "adapters", "--port", "0"]
    settings = ["engine.memory_gb=0.05", "engine.max_running=1", "engine.step_tokens=64"]
    announced = [tmp_path / "live" / f"{i}.json" for i in range(2)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {**os.environ, "HF_HUB_OFFLINE": "1"}}
    started = [
        subprocess.Popen([*map(str, command), "--announce", str(file), *settings], **quiet) for file in announced
    ]
    try:
        until(lambda: all(file.exists() for file in announced) or any(one.poll() is not None for one in started), 120)
        yield {json.loads(file.read_text())["url"]: one for file, one in zip(announced, started, strict=True)}
    finally:
        for one in started:
            one.kill()
            one.wait()


@pytest.mark.slow
def test_one_of_two_is_killed_and_the_other_is_asked_to_end(
    replicas: dict[str, subprocess.Popen[bytes]], router: ModuleType, tmp_path: Path
) -> None:
    router.Router.folder = tmp_path / "live"
    with ThreadingHTTPServer(("127.0.0.1", 0), router.Router) as there:
        threading.Thread(target=there.serve_forever, daemon=True).start()
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{there.server_port}/v1", api_key="x", max_retries=0, timeout=60
        )
        create = client.completions.create
        until(lambda: len(router.live(tmp_path / "live")) == 2)
        # Homes hang on the addresses, whose ports are drawn: three names of each server among many.
        homes: dict[str, list[str]] = {url: [] for url in replicas}
        servers = [said(url) for url in replicas]
        for name in NAMES:
            homes[router.ordered(servers, name)[0]["url"]].append(name)
        homes = {url: names[:3] for url, names in homes.items()}
        assert all(len(names) == 3 for names in homes.values())
        asked = [name for names in homes.values() for name in names]
        for name in asked:
            assert create(model=name, prompt="1+1=", max_tokens=2).model == name
        until(lambda: {one["url"]: set(one["loaded"]) for one in router.live(tmp_path / "live")} == {
            url: {*names} for url, names in homes.items()
        })  # fmt: skip
        gone, left = replicas
        replicas[gone].kill()
        for name in asked:
            assert create(model=name, prompt="1+1=", max_tokens=2).model == name
        stream = create(model="model", prompt="1", n=16, max_tokens=60, stream=True,
                        extra_body={"ignore_eos": True})  # fmt: skip
        next(iter(stream))
        replicas[left].send_signal(signal.SIGTERM)
        ends = [choice.finish_reason for chunk in stream for choice in chunk.choices if choice.finish_reason]
        assert ends == ["length"] * 16, "what ran was finished"
        assert replicas[left].wait(60) in (0, -signal.SIGTERM)
        until(lambda: not router.live(tmp_path / "live"))
        with pytest.raises(openai.InternalServerError):
            create(model=NAMES[0], prompt="1")
        there.shutdown()
