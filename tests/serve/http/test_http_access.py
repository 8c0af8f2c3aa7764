"""Who may do what: keys, tenants, adapters that come and go, and nothing from outside of the folder."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from http_servers import ASK, Server, ask, post, write_adapter

from adapterlab.errors import ConfigError, FormatError, UnusableAdapterError
from adapterlab.serve.http import keys as all_keys
from adapterlab.serve.http.limits import Limits
from adapterlab.serve.http.server import check_address
from adapterlab.serve.http.shelf import Shelf


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    made = {
        "user": all_keys.add(file, "user", ["infer"]),
        "admin": all_keys.add(file, "admin", ["infer", "admin"]),
        "acme": all_keys.add(file, "acme-key", ["infer", "admin"], "acme"),
        "leaver": all_keys.add(file, "leaver", ["infer"]),
    }
    return {"file": file, **made}


@pytest.fixture(scope="module")
def locked(make_server: Callable[..., Server], held: dict[str, Any]) -> Iterator[Server]:
    made = make_server(held["file"])
    yield made
    made.stop()


def names(server: Server, key: str) -> list[str]:
    return [one["id"] for one in ask(server, "GET", "/v1/models", key=key)[1]["data"]]


def test_only_keys_come_in(locked: Server, held: dict[str, Any]) -> None:
    for key in (None, "al-nothing", held["user"][:-1], held["user"] + "x", "ü"):
        headers = {} if key is None else {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
        status, found, _ = ask(locked, "GET", "/v1/models", **headers)
        assert (status, found["error"]["code"]) == (401, "invalid_api_key")
    assert names(locked, held["user"]) == ["base", "sums", "team/words"]
    assert ask(locked, "GET", "/health")[0] == ask(locked, "GET", "/ready")[0] == 200


def test_the_key_comes_before_the_body(locked: Server, held: dict[str, Any]) -> None:
    """Nothing of a body is waited for, or read, from somebody who may not ask."""
    place = urlsplit(locked.url)
    for key, path, status in (("al-nothing", "/v1/completions", 401), (held["user"], "/v1/load_lora_adapter", 403)):
        with socket.create_connection((place.hostname or "", place.port or 0), timeout=5) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Authorization: Bearer {key}\r\nContent-Length: 1000\r\n\r\n{{".encode())
            assert connection.recv(4096).startswith(f"HTTP/1.1 {status} ".encode())
    for wrong in (b"no JSON", b"[" * 1000):
        assert ask(locked, "POST", "/v1/completions", wrong)[0] == 401
        assert ask(locked, "PUT", "/v1/adapters/x", wrong, held["user"])[0] == 403
        assert ask(locked, "POST", "/v1/completions", wrong, held["user"])[0] == 400


def test_scopes_part_asking_from_changing(locked: Server, held: dict[str, Any]) -> None:
    for method, path, body in (
        ("PUT", "/v1/adapters/sums", {}),
        ("DELETE", "/v1/adapters/sums", None),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "sums"}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "sums"}),
        ("GET", "/metrics", None),
    ):
        assert ask(locked, method, path, body, held["user"])[0] == 403
        assert ask(locked, method, path, body)[0] == 401
    assert "sums" in names(locked, held["user"])


def test_tenants_see_their_own_adapters_and_everybodys(locked: Server, held: dict[str, Any]) -> None:
    assert names(locked, held["acme"]) == ["base", "own", "sums", "team/words"]
    ours = {"model": "own", "messages": ASK}
    assert post(locked, "/v1/chat/completions", ours, held["acme"])[1]["choices"][0]["message"]["content"] == "own 5 0"
    assert locked.engine.handles[-1].request.tenant == "acme"
    assert post(locked, "/v1/chat/completions", ours, held["user"])[0] == 404
    for path in ("../@other/own", "@other/own", "../sums", "sums"):
        assert ask(locked, "PUT", "/v1/adapters/stolen", {"path": path}, held["acme"])[0] == 400
    assert ask(locked, "DELETE", "/v1/adapters/sums", key=held["acme"])[0] == 404
    hiding = {"lora_name": "sums", "lora_path": "own"}  # everybody's of this name is hidden, not replaced
    assert post(locked, "/v1/load_lora_adapter", hiding, held["acme"])[0] == 200
    assert ask(locked, "GET", "/v1/adapters/sums", key=held["acme"])[1]["tenant"] == "acme"
    assert ask(locked, "GET", "/v1/adapters/sums", key=held["user"])[1]["tenant"] is None
    assert ask(locked, "DELETE", "/v1/adapters/sums", key=held["acme"])[0] == 200
    assert ask(locked, "PUT", "/v1/adapters/copy", {"path": "own"}, held["acme"])[0] == 200
    assert "copy" not in names(locked, held["admin"])
    assert ask(locked, "DELETE", "/v1/adapters/copy", key=held["acme"])[0] == 200


def test_a_key_that_is_taken_back_is_refused_at_once(locked: Server, held: dict[str, Any]) -> None:
    assert names(locked, held["leaver"])
    all_keys.remove(held["file"], "leaver")
    assert ask(locked, "GET", "/v1/models", key=held["leaver"])[0] == 401


def test_the_file_of_keys_holds_no_key(held: dict[str, Any], tmp_path: Path) -> None:
    text = held["file"].read_text()
    assert not any(key in text for name, key in held.items() if name != "file")
    assert len(set(held.values())) == len(held)
    with pytest.raises(ConfigError, match="has a key named 'user'"):
        all_keys.add(held["file"], "user", ["infer"])
    with pytest.raises(ConfigError, match=r"no scope 'admn'\. Nearest: admin"):
        all_keys.add(tmp_path / "new.json", "x", ["admn"])
    with pytest.raises(ConfigError, match="no name"):
        all_keys.add(tmp_path / "new.json", "x", ["infer"], tenant="../x")
    for damaged in ("[]", '{"format": 1, "keys": [{"name": "x"}]}', '{"format": 2, "keys": []}'):
        (tmp_path / "damaged.json").write_text(damaged)
        with pytest.raises(FormatError):
            all_keys.Keys(tmp_path / "damaged.json")


def test_without_keys_a_page_of_another_name_is_not_answered(server: Server) -> None:
    for host, status in (("evil.example", 403), ("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200)):
        assert ask(server, "GET", "/v1/models", Host=host)[0] == status
    plain = {"Content-Type": "text/plain"}  # what a page may send without being asked whether it may
    assert ask(server, "POST", "/v1/completions", {"prompt": "1"}, **plain)[0] == 400


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "example.org", "::"])
def test_others_are_let_in_with_keys_alone(host: str) -> None:
    with pytest.raises(ConfigError, match="adapterlab keys add"):
        check_address(host, keys=False)
    check_address(host, keys=True)
    check_address("127.0.0.1", keys=False)


def test_adapters_come_and_go(server: Server) -> None:
    status, made, _ = ask(server, "PUT", "/v1/adapters/new/one", {"path": "sums"})
    assert (status, made["id"], made["version"], made["state"], made["path"]) == (
        200,
        "new/one",
        1,
        "registered",
        "sums",
    )
    assert ask(server, "PUT", "/v1/adapters/new/one", {"warm": True})[1]["state"] == "loaded"
    assert ask(server, "PUT", "/v1/adapters/new/one", {"pinned": True})[1]["pinned"] is True
    again = ask(server, "PUT", "/v1/adapters/new/one", {"path": "team/words"})[1]
    assert (again["version"], again["path"]) == (2, "team/words")
    assert ask(server, "GET", "/v1/adapters/new/one")[1] == again
    assert "new/one" in [one["id"] for one in ask(server, "GET", "/v1/adapters")[1]["data"]]
    assert ask(server, "DELETE", "/v1/adapters/new/one")[1]["deleted"] is True
    assert ask(server, "GET", "/v1/adapters/new/one")[0] == 404
    assert ask(server, "DELETE", "/v1/adapters/new/one")[0] == 404


def test_adapters_come_and_go_as_with_vllm(server: Server) -> None:
    wish = {"lora_name": "theirs", "lora_path": "sums"}
    status, said, _ = post(server, "/v1/load_lora_adapter", wish)
    assert (status, said) == (200, "Success: LoRA adapter 'theirs' added successfully.")
    status, said, _ = post(server, "/v1/load_lora_adapter", wish)
    assert status == 400
    assert "load_inplace" in said["error"]["message"]
    assert post(server, "/v1/load_lora_adapter", {**wish, "load_inplace": True})[0] == 200
    assert post(server, "/v1/unload_lora_adapter", {"lora_name": "theirs"})[0] == 200
    assert post(server, "/v1/unload_lora_adapter", {"lora_name": "theirs"})[0] == 404


@pytest.mark.parametrize("path", ["../outside", "link", "{root}/../outside", "/etc", "", ".", "a\0b", "x" * 4000, "no"])
def test_nothing_is_loaded_from_outside_of_the_folder(server: Server, shelf: Path, path: str) -> None:
    status, found, _ = ask(server, "PUT", "/v1/adapters/x", {"path": path.format(root=shelf)})
    assert status == 400
    assert "There is no adapter" in found["error"]["message"]
    assert str(shelf) not in json.dumps(found) or path.startswith("{")


def test_an_absolute_path_inside_is_as_good(server: Server, shelf: Path) -> None:
    assert ask(server, "PUT", "/v1/adapters/x", {"path": str(shelf / "sums")})[0] == 200
    assert ask(server, "DELETE", "/v1/adapters/x")[0] == 200


def test_what_is_too_large_or_has_no_name_is_refused(server: Server) -> None:
    status, found, _ = ask(server, "PUT", "/v1/adapters/large", {})
    assert status == 400
    assert "limits.adapter_rank" in found["error"]["message"]
    for name in ("a%20b", "..%2Fx", "base", "%40acme/x", "x" * 300, "a//b"):
        assert ask(server, "PUT", f"/v1/adapters/{name}", {"path": "sums"})[0] in (400, 404)


def test_every_limit_on_adapters_holds_whatever_the_settings_call_a_rank(tmp_path: Path) -> None:
    def check(folder: Path, **limits: int) -> None:
        Shelf(tmp_path, Limits(**{"adapter_rank": 32, **limits})).place(folder.name, None)

    plain = write_adapter(tmp_path / "plain")
    file = plain / "adapter_model.safetensors"
    check(plain, adapter_bytes=file.stat().st_size, adapter_tensors=1, adapter_rank=4)
    with pytest.raises(UnusableAdapterError, match=r"adapter_rank 4, .* up to 3 \(limits.adapter_rank\)"):
        check(plain, adapter_rank=3)
    with pytest.raises(UnusableAdapterError, match=r"limits\.adapter_bytes"):
        check(plain, adapter_bytes=file.stat().st_size - 1)
    save_file({f"x{i}": torch.ones(1) for i in range(2)}, file)
    with pytest.raises(UnusableAdapterError, match="adapter_tensors 2, "):
        check(plain, adapter_tensors=1)
    config = json.loads((plain / "adapter_config.json").read_text())
    adaptive = {"peft_type": "ADALORA", "init_r": 33, "target_r": 8}
    for number, said in enumerate((
        {"rank_pattern": {"q_proj": 33}}, {"rank_pattern": {"x.q_proj": "33"}}, {"r": "33"}, {"r": 33.0}, adaptive,
    )):  # fmt: skip
        hostile = write_adapter(tmp_path / str(number))
        (hostile / "adapter_config.json").write_text(json.dumps({**config, **said}))
        with pytest.raises(UnusableAdapterError, match="adapter_rank 33, "):
            check(hostile)
    write_adapter(plain / "0", r=33)
    with pytest.raises(UnusableAdapterError, match="adapter_rank 33, "):
        check(plain)
