"""The verbs that talk to a server, and the one that starts vLLM."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from http_servers import Server, write_adapter

from adapterlab.cli import main
from adapterlab.errors import MissingDependencyError, ServingError
from adapterlab.serve import vllm
from adapterlab.serve.client import Client, RemoteConversation
from adapterlab.serve.http.tools import calls_in
from adapterlab.serve.load import Load, drawn, quantile


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def called(*args: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(arg) for arg in args])
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return called


def test_adapters_are_listed_loaded_and_unloaded(server: Server, run: Callable[..., tuple[int, str, str]]) -> None:
    at = ("--server", server.url)
    assert run("adapters", "load", "mine", "--path", "sums", *at) == (0, "mine: registered\n", "")
    assert run("adapters", "pin", "mine", *at)[1] == "mine: loaded, pinned\n"
    assert run("adapters", "unpin", "mine", *at)[1] == "mine: loaded\n"
    code, listed, _ = run("adapters", "list", *at)
    assert code == 0
    assert "mine" in listed
    assert [one["id"] for one in json.loads(run("adapters", "list", "--json", *at)[1])] == [
        "mine",
        "sums",
        "team/words",
    ]
    assert run("adapters", "unload", "mine", *at)[1] == "mine: unloaded\n"
    assert run("adapters", "unload", "mine", *at)[0] == 2
    assert "needs the name" in run("adapters", "pin", *at)[2]
    assert "does not answer" in run("adapters", "list", "--server", "http://127.0.0.1:9")[2]


def test_a_conversation_goes_on_over_the_wire(server: Server) -> None:
    talk = RemoteConversation(Client(server.url), "base", "be short", 40, 0.0, 0)
    pieces: list[str] = []
    talk.say("1+1=", pieces.append)
    assert "".join(pieces) == f"base {len('be short>1+1=>')} 0"
    talk.activate("sums")
    pieces.clear()
    talk.say("2", pieces.append)
    assert "".join(pieces).startswith("sums ")
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 2
    assert talk.active == ("sums",)
    with pytest.raises(ServingError, match="nowhere"):
        talk.activate("nowhere")
    assert list(talk.methods) == ["sums", "team/words"]


def test_chat_talks_to_a_server(
    server: Server, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["1", "/adapter sums", "2", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    code, said, _ = run("chat", "base", "--server", server.url, "--max-new-tokens", "40")
    assert code == 0
    assert "base 2 0" in said
    assert "sums (live)" in said


def test_keys_are_made_once_and_taken_back(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    file = ("--file", tmp_path / "keys.json")
    code, key, _ = run("keys", "add", "ci", "--scope", "infer", "--scope", "admin", "--tenant", "acme", *file)
    assert (code, key.startswith("al-")) == (0, True)
    assert run("keys", "list", *file)[1] == "ci: infer, admin; tenant acme\n"
    assert run("keys", "add", "ci", *file)[0] == 2
    assert run("keys", "remove", "ci", *file)[0] == 0
    assert run("keys", "list", "--json", *file)[1].strip() == "[]"


def test_serving_refuses_before_it_loads(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    from tiny_folder import write_model

    model = write_model(tmp_path / "model")
    for args, part in (
        ((model, "--host", "0.0.0.0"), "adapterlab keys add"),
        ((model, "--adapters", tmp_path / "no"), "is no folder"),
        ((model, "limits.second=3"), "error: Limits has no setting 'second' (received 3). Nearest: seconds"),
        (
            (model, "engine.step_tokens=10"),
            "error: EngineSettings = {'step_tokens': 10} is not valid: step_tokens must",
        ),
        ((model, "--announce-as", "http://x"), "give that too"),
        ((model, "--announce", tmp_path), "no place for a file"),
        ((model, "--engine", "vllm"), "not installed"),
        ((write_adapter(tmp_path / "adapter"),), "Serve its base, tiny"),
        ((model, "--keys", tmp_path / "no.json"), "adapterlab keys add NAME"),
    ):
        code, _, said = run("serve", *args)
        assert code == 2
        assert part in " ".join(said.split())


def test_vllm_gets_what_it_can_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDependencyError, match="not installed"):
        vllm.plan("m", [], host="127.0.0.1", port=8000, name="base")
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    folders = {name: write_adapter(tmp_path / name, r=r) for name, r in (("small", 4), ("wide", 24), ("dora", 4))}
    file = folders["dora"] / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True, "modules_to_save": ["lm_head"]}))
    (tmp_path / "ours").mkdir()
    base = tmp_path / "where it lies"
    monkeypatch.setattr(vllm, "resolve", lambda name: base if name == "alias" else None)
    found = [*folders.items(), ("ours", tmp_path / "ours")]
    made = vllm.plan("alias", found, host="127.0.0.1", port=8000, name="base")
    assert made.command[:3] == (str(program), "serve", str(base))
    assert made.command[made.command.index("--max-lora-rank") + 1] == "32"
    assert made.served == ("small", "wide")
    assert f"wide={tmp_path / 'wide'}" in made.command
    assert set(made.refused) == {"dora", "ours"}
    assert "use_dora" in made.refused["dora"]
    assert "modules_to_save" in made.refused["dora"]


def test_vllm_is_started_and_its_end_is_ours(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_folder import write_model

    model, shelf, told = write_model(tmp_path / "model"), tmp_path / "adapters", tmp_path / "told"
    write_adapter(shelf / "sums")
    write_adapter(shelf / "wide", r=1024)
    write_adapter(shelf / "@acme" / "own")
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > '{told}'\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    asked = ("serve", model, "--engine", "vllm", "--adapters", shelf, "limits.adapter_rank=9999")
    code, _, said = run(*asked)
    assert (code, told.exists()) == (2, False)
    assert "start vllm yourself with its own options" in " ".join(said.split())
    code, said, warned = run(*asked[:-1], "--host", "::1", "--port", "8123", "--name", "base")
    assert code == 7
    assert "Starting vLLM with 1 adapters." in said
    assert "not served: wide: rank 1024 is above vLLM's" in " ".join(warned.split())
    assert told.read_text().splitlines() == [
        "serve", str(model), "--host", "::1", "--port", "8123", "--served-model-name", "base",
        "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"sums={shelf / 'sums'}",
    ]  # fmt: skip


class _Tagged:
    chat_template = "... <tool_call> ..."


def test_calls_are_taken_out_of_answers() -> None:
    call = '<tool_call>\n{"name": "find", "arguments": {"what": "x"}}\n</tool_call>'
    text, calls = calls_in(_Tagged(), None, f"Let me look. {call}{call}")
    assert text == "Let me look."
    assert [one["function"] for one in calls] == [{"name": "find", "arguments": '{"what": "x"}'}] * 2
    assert len({one["id"] for one in calls}) == 2
    for whole in (
        "no call",
        "<tool_call>no json</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>[1]",
    ):
        assert calls_in(_Tagged(), None, whole) == (whole, [])
    assert calls_in(_Tagged(), "a template without tags", call) == (call, [])


def test_a_load_is_put_on_a_server(server: Server, run: Callable[..., tuple[int, str, str]]) -> None:
    at = ("--server", server.url, "--json")
    code, said, _ = run("bench", "serve", "requests=12", "clients=3", "answer_tokens=4", *at)
    found = json.loads(said)
    assert (code, found["requests"], found["errors"], found["models"]) == (0, 12, 0, 2)
    assert found["tokens_per_second"] == pytest.approx(12 * 4 / found["seconds"])
    assert 0 < found["first_token_p50"] <= found["first_token_p95"]
    _, said, _ = run("bench", "serve", "requests=4", "rate=20", "--base", *at)
    assert json.loads(said)["seconds"] > 0.02
    code, said, _ = run("bench", "serve", "requests=2", "--adapter", "nowhere", "--server", server.url)
    assert code == 1
    assert "2 requests" in said


def test_loads_are_drawn_by_their_settings() -> None:
    models = [f"a{i}" for i in range(50)]
    asked = list(drawn(Load(requests=2000, rate=10.0, skew=1.0), models))
    assert asked == list(drawn(Load(requests=2000, rate=10.0, skew=1.0), models))
    assert asked[-1].at == pytest.approx(200, rel=0.1)
    share = sum(one.model == "a0" for one in asked) / len(asked)
    assert share == pytest.approx(1 / sum(1 / rank for rank in range(1, 51)), rel=0.15)
    assert len({one.prompt.partition(" ")[0] for one in asked}) == len(asked)
    assert [quantile([3.0, 1.0, 2.0, 4.0], share) for share in (0.25, 0.5, 0.51, 0.95, 1)] == [1, 2, 3, 4, 4]
