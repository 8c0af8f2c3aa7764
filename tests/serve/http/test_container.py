"""The image of docker/: what it copies is there, and our command line takes what it runs."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from adapterlab.cli import main, serve
from adapterlab.serve.http import health, keys
from tiny_folder import write_model

ROOT = Path(__file__).parents[3]
FILE = ROOT / "docker" / "Dockerfile"
SECRET = "/run/secrets/keys.json"


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the file, in order, and what follows it."""
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    found = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(name, " ".join(said.split())) for name, said in found]


def only(name: str) -> str:
    (said,) = (said for one, said in instructions() if one == name)
    return said


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """What the paths of the image are here."""
    (tmp_path / "adapters").mkdir()
    keys.add(tmp_path / "keys.json", "me", ["infer"])
    model = write_model(tmp_path / "model")
    return {
        "/models/base": str(model),
        "/adapters": str(tmp_path / "adapters"),
        SECRET: str(tmp_path / "keys.json"),
        "8000": "0",  # here the port may be taken
    }


def test_what_it_runs_is_a_command_of_ours(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *command = json.loads(only("ENTRYPOINT"))
    assert program == "adapterlab"
    command = [*command, *json.loads(only("CMD"))]
    assert places.keys() <= {*command}
    command = [places.get(word, word) for word in command]
    seen: dict[str, Any] = {}
    monkeypatch.setattr(serve, "_service", lambda place, shelf, settings, name, keys, *_: seen.update(keys=keys))
    monkeypatch.setattr(serve, "_serve", lambda made, listening, host, *_: seen.update(host=host))
    with pytest.raises(SystemExit) as stopped:
        main([*command, "engine.memory_gb=8"])
    assert not stopped.value.code
    assert seen == {"keys": places[SECRET], "host": "0.0.0.0"}
    at = command.index("--keys")
    with pytest.raises(SystemExit) as stopped:
        main(command[:at] + command[at + 2 :])
    assert stopped.value.code == 2, "not without keys"


def test_it_is_asked_how_it_is_where_it_listens() -> None:
    command = json.loads(only("HEALTHCHECK").partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    (port, route) = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", command[2])[0]
    entry = json.loads(only("ENTRYPOINT"))
    assert port == only("EXPOSE") == entry[entry.index("--port") + 1]
    assert route in {one.path for one in health.router.routes}  # type: ignore[attr-defined]


def test_it_copies_what_is_there_and_installs_what_there_is() -> None:
    copied = [path for name, said in instructions() if name == "COPY" for path in shlex.split(said)[:-1]]
    sent = [line[1:] for line in FILE.with_name("Dockerfile.dockerignore").read_text().split() if line[0] == "!"]
    assert sorted(copied) == sorted(sent)
    assert all((ROOT / path).exists() for path in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {project["readme"], *project["license-files"]} <= {*copied}
    runs = " ".join(said for name, said in instructions() if name == "RUN")
    ((extras,),) = (re.findall(r"'/src\[([\w,]+)\]'", runs),)
    assert {*extras.split(",")} <= {*project["optional-dependencies"]}
    assert re.search(r"--constraint /src/(\S+)", runs)[1] in copied  # type: ignore[index]
    assert only("ARG") == "DEVICE=cpu"
    assert {"cpu)", "cuda)"} <= {*runs.split()}


def test_it_is_run_by_a_user_who_may_write_nothing_but_at_home() -> None:
    names = [name for name, _ in instructions()]
    assert only("USER") not in ("root", "0")
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))
    assert f"useradd --uid 10001 --create-home {only('USER')}" in " ".join(said for _, said in instructions())
    assert json.loads(only("VOLUME")) == ["/models", "/adapters"]


def test_the_page_builds_this_file_and_brings_what_it_reads() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert f"docker build -f {FILE.relative_to(ROOT)} " in page
    for place in ("/models/base", "/adapters", SECRET):
        assert f":{place}:ro" in page
