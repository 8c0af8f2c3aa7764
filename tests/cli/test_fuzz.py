"""No input brings a traceback: all verbs, all keys of configurations and all files that are read, with drawn faults.

Whatever comes is an answer or one message with exit code 2, and a refused command has written nothing. The drawn inputs
are the same each time; `ADAPTERLAB_FUZZ=2000 pytest tests/cli/test_fuzz.py` looks further.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapterlab.cli import build, main
from adapterlab.compare.config import CompareConfig
from adapterlab.settings import keys
from adapterlab.train.config import TrainConfig
from tiny_folder import write_model
from tiny_runs import make_config, write_data

EXAMPLES = int(os.environ.get("ADAPTERLAB_FUZZ", "40"))
BOUNDED = settings(
    max_examples=EXAMPLES, deadline=None, derandomize="ADAPTERLAB_FUZZ" not in os.environ, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
# Values as they stand in YAML, and in JSON.
TEXTS = (
    "", "null", "true", "0", "-1", "1", "3.5", "1e12", "-1e-300", "99999999999999999999",
    ".inf", "-.inf", ".nan", "x", "'0'",
    "[]", "[1, x]", "{}", "{a: {b: [1]}}", "{include: [q], layers: '0-1'}", "[[[[[[]]]]]]", "~/x", "/", "../..",
    "a\\tb",
    '"\\e[2J"', '"\\0"', "${x", "$a_{b", "{{7*7}}", "<script>", "=1+1", "2024-01-01", "!!python/name:os.system",
    "&a [*a]",
    "[" * 3000, "a" * 5000, "meta", "cuda:99", "cpu:0",
)  # fmt: skip
VALUES = (
    None, True, 0, -1, 1, 3.5, 1e300, float("nan"), float("inf"), 10**30, 2**40, "", "x", "\0", "\ud800", "../../x",
    "/etc/passwd",
    "a" * 4000, [], [1], [[[]]], {}, {"a": {"b": 1}}, {"auto_map": {"AutoConfig": "x.Y"}},
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, a finished run with its configuration, and nothing else."""
    root = tmp_path_factory.mktemp("fuzz")
    write_model(root / "model")
    write_data(root / "rows.jsonl", 12)
    config = {**make_config(root, steps=1, save_every=1), "output": str(root / "run")}
    config["data"]["eval_size"] = 2
    config["training"]["warmup"] = 0
    (root / "run.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str))))
    assert called("train", root / "run.yaml", "--quiet")[0] == 0
    return root


def called(*args: object) -> tuple[int, str]:
    """Run the command line in this process: (exit code, what stands on stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            main([str(arg) for arg in args])
        except SystemExit as left:
            return int(left.code or 0), err.getvalue()
    return 0, err.getvalue()


def holds(root: Path, *args: object) -> int:
    """Call, and require an answer or one message; a refused call leaves every file as it was. Returns the exit code."""
    before = written(root)
    code, said = called(*args)
    assert code in (0, 2), f"exit code {code} of {args}: {said[-500:]}"
    assert "Traceback" not in said
    if code == 2:
        assert said.count("error:") == 1 or "Usage:" in said, said
        assert written(root) == before, f"{args} was refused and has written: {written(root) ^ before}"
    return code


def written(root: Path) -> set[tuple[str, int, int]]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@seed(1)
@BOUNDED
@given(key=st.sampled_from([key.name for key in keys(TrainConfig)] + ["method.r", "method.targets", "method.x", "x.y"]),
       text=st.sampled_from(TEXTS))  # fmt: skip
def test_settings_of_a_run(place: Path, key: str, text: str) -> None:
    if key not in ("output", "model"):  # what a user names there is where he wants it
        holds(place, "train", place / "run.yaml", "--dry-run", f"{key}={text}")


@seed(2)
@BOUNDED
@given(key=st.sampled_from([key.name for key in keys(CompareConfig)]), text=st.sampled_from(TEXTS))
def test_settings_of_a_comparison(place: Path, key: str, text: str) -> None:
    fixed = [f"model={place / 'model'}", f"data.path={place / 'rows.jsonl'}", "methods=[{lora: {label: '$a_{b'}}]",
             "budget.steps=1", f"output={place / 'compared'}"]  # fmt: skip
    holds(place, "compare", *(pair for pair in fixed if not pair.startswith(f"{key}=")), f"{key}={text}", "--dry-run")


READERS: dict[str, tuple[str, ...]] = {
    "run/run.json": ("evaluate", "{root}/run", "--limit", "1"),
    "run/config.yaml": ("train", "{root}/run/config.yaml", "--dry-run"),
    "run/checkpoint/state.pt": ("train", "{root}/run.yaml", "--resume"),
    "run/last/method.json": ("export", "{root}/run/last", "--output", "{root}/out"),
    "run/last/adapter_config.json": ("analyze", "{root}/run/last"),
    "run/last/adapter_model.safetensors": ("generate", "{root}/run/last", "1+1=", "--max-new-tokens", "2"),
    "model/config.json": ("targets", "{root}/model"),
    "model/generation_config.json": ("generate", "{root}/model", "1+1=", "--max-new-tokens", "2"),
    "model/tokenizer_config.json": ("generate", "{root}/model", "1+1=", "--max-new-tokens", "2"),
    "model/tokenizer.json": ("train", "{root}/run.yaml", "--dry-run"),
    "rows.jsonl": ("train", "{root}/run.yaml", "--dry-run"),
}


@seed(3)
@BOUNDED
@given(name=st.sampled_from(sorted(READERS)), data=st.data())
def test_files_of_all_kinds(place: Path, name: str, data: st.DataObject) -> None:
    file = place / name
    kept = file.read_bytes()
    beside = place / "run" / "last" / "method.json"
    ours = beside.read_bytes()
    try:
        file.write_bytes(damaged(kept, data.draw))
        if name.endswith("adapter_config.json") or data.draw(st.booleans()):
            beside.unlink()
        holds(place, *(arg.format(root=place) for arg in READERS[name]))
    finally:
        file.write_bytes(kept)
        beside.write_bytes(ours)
        shutil.rmtree(place / "out", ignore_errors=True)


def damaged(content: bytes, draw: Callable[[Any], Any]) -> bytes:
    """Draw a fault: a value of another kind somewhere in JSON, or bytes that are missing, changed or too many."""
    kind = draw(st.sampled_from(["value", "value", "value", "missing", "cut", "bytes", "empty", "deep"]))
    if kind in ("value", "missing"):
        with contextlib.suppress(ValueError):
            lines = content.decode().splitlines() if content.count(b"\n{") else [content.decode()]
            at = draw(st.integers(0, len(lines) - 1))
            lines[at] = json.dumps(changed(json.loads(lines[at]), draw, kind == "missing"))
            return "\n".join(lines).encode("utf-8", "surrogatepass")
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "cut":
        return content[:place]
    if kind == "deep":
        return b"[" * 200_000
    if kind == "empty":
        return b""
    return content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place + 1 :]


def changed(tree: Any, draw: Callable[[Any], Any], gone: bool) -> Any:
    """Replace or remove one drawn value of a JSON tree."""
    inner = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    if not inner or draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(VALUES))
    key = draw(st.sampled_from(inner))
    if gone and isinstance(tree, dict):
        return {name: value for name, value in tree.items() if name != key}
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[key] = changed(tree[key], draw, gone)
    return copy


ROOT = typer.main.get_command(build())
LONG = ("chat", "pull", "quickstart", "serve", "train")  # they ask, fetch or work until somebody ends them
VERBS = [name for name in ROOT.list_commands(click.Context(ROOT)) if name not in LONG]


@seed(4)
@BOUNDED
@given(verb=st.sampled_from(VERBS), data=st.data())
def test_options_of_all_verbs(place: Path, verb: str, data: st.DataObject) -> None:
    command = ROOT.get_command(click.Context(ROOT), verb)
    assert command is not None
    args: list[object] = []
    for parameter in command.params:
        drawn = data.draw(option(parameter, place))
        args += drawn
    try:
        holds(place, verb, *args)
    finally:
        shutil.rmtree(place / "out", ignore_errors=True)


def option(parameter: click.Parameter, root: Path) -> st.SearchStrategy[list[object]]:
    """An argument or option with a value that suits it, or not; options are mostly left out."""
    names = {"output": root / "out", "picture": root / "out" / "x.png", "past": root, "write": root / "out" / "x.yaml"}
    things = st.sampled_from([root / "run", root / "run" / "last", root / "model", root / "rows.jsonl", root / "none"])
    if parameter.name in names:
        return st.just([parameter.opts[0], names[parameter.name]])
    if parameter.name in ("cache", "help_config"):
        return st.just([])
    values = st.one_of(things, st.sampled_from([text for text in TEXTS if text and "\\0" not in text]))
    if isinstance(parameter, click.Argument):
        return st.lists(values, min_size=int(parameter.required), max_size=2 if parameter.nargs < 0 else 1)  # type: ignore[return-value]
    if getattr(parameter, "is_flag", False):
        return st.sampled_from([[], [], [], [parameter.opts[0]]])
    return st.one_of(st.just([]), st.just([]), values.map(lambda value: [parameter.opts[0], value]))


def test_a_pipe_in_the_place_of_a_file_is_refused(place: Path) -> None:
    os.mkfifo(place / "pipe.jsonl")
    try:
        for args in (("train", place / "run.yaml", "--dry-run", f"data.path={place / 'pipe.jsonl'}"),
                     ("train", place / "pipe.jsonl", "--dry-run"), ("report", place / "pipe.jsonl")):  # fmt: skip
            assert called(*args)[0] == 2
    finally:
        (place / "pipe.jsonl").unlink()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("train", "{root}/run.yaml", "--dry-run", "training.epochs=.inf", "training.steps=null"), "finite number"),
        (("train", "{root}/run.yaml", "--dry-run", "training.seed=99999999999999"), "less than 4294967296"),
        (("train", "{root}/run.yaml", "--dry-run", "training.batch_size=1000000000000"), "each would count many times"),
        (("train", "{root}/run.yaml", "--dry-run", "method.r=1000000000"), "not enough memory"),
        (("train", "{root}/run.yaml", "--dry-run", "device=meta"), "is not there"),
        (("plan", "--model", "{root}/model", "--length", "1000000000"), "more tokens than a step can have"),
        (("generate", "{root}/run", "1+1=", "--max-new-tokens", "2", "--temperature", "nan"), "temperature must be"),
        (("extract", "{root}/broken", "--base", "{root}/model", "--output", "{root}/out"), "not finite"),
        (("export", "{root}/run", "--model", "{root}/broken", "--output", "{root}/out"), "not finite"),
        (("analyze", "{root}/broken", "--base", "{root}/model"), "not finite"),
    ],
)
def test_what_was_asked_is_named(place: Path, args: tuple[str, ...], message: str) -> None:
    if not (place / "broken").exists():
        shutil.copytree(place / "model", place / "broken")
        weights = load_file(place / "broken" / "model.safetensors")
        weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
        save_file(weights, place / "broken" / "model.safetensors", {"format": "pt"})
    code, said = called(*(arg.format(root=place) for arg in args))
    assert code == 2
    assert message in said
    assert not (place / "out").exists()


def test_targets_may_be_a_mapping_over_a_list(place: Path) -> None:
    targets = "method.targets={include: [q], layers: '0-1'}"
    assert called("train", place / "run.yaml", "--dry-run", targets)[0] == 0
