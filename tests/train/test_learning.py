"""The two phases of methods that learn from adapters of other tasks, and what a run leaves of a prompt's network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import adapterlab as al
from adapterlab.cli import build
from adapterlab.errors import AdapterlabError, ConfigError, DataError
from tiny_runs import make_config, write_data


def run(root: Path, name: str, method: dict[str, Any], rows: Path | None = None) -> Path:
    config = make_config(root, steps=6, save_every=6, eval_every=6)
    config |= {"method": method, "output": str(root / name)}
    if rows is not None:
        config["data"] = {**config["data"], "path": str(rows)}
    al.fit(config, quiet=True)
    return root / name


def learn(*args: object) -> dict[str, Any]:
    result = CliRunner().invoke(build(), ["learn", *(str(a) for a in args), "--device", "cpu", "--json"])
    if isinstance(result.exception, AdapterlabError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def sources(root: Path) -> list[Path]:
    """Runs of prompt tuning on two tasks."""
    plain = {"name": "prompt_tuning", "length": 4}
    return [run(root, f"task_{i}", plain, write_data(root / f"rows_{i}.jsonl", 16, seed=i)) for i in range(2)]


@pytest.mark.parametrize(
    ("method", "first"), [("ipt", {"size": 3, "hidden": 8}), ("mpt", {"tasks": 2})], ids=["ipt", "mpt"]
)
def test_two_phases_by_the_command_line(method: str, first: dict[str, int], sources: list[Path], root: Path) -> None:
    settings = [part for key, value in {"length": 4, **first}.items() for part in ("--set", f"{key}={value}")]
    said = learn(*sources, "--method", method, *settings, "--steps", 20, "--lr", 0.01, "--output", root / "learned")
    assert len(said["losses"]) == 20
    assert said["learned_from"] == ["task_0", "task_1"]
    again = {**first, "tasks": 1} if method == "mpt" else first
    folder = run(root, "second", {"name": method, "length": 4, "source": str(root / "learned"), **again})
    model, _ = al.load_model(root / "model", precision="fp32", device="cpu")
    host = al.load(model, folder / "last")
    assert host.methods[next(iter(host.methods))].id == method
    if method == "ipt":
        rows = learn(*sources, "--method", method, *settings, "--steps", 5, "--no-data", "--output", root / "bare")
        assert len(rows["losses"]) == 5
    else:
        with pytest.raises(DataError, match="no batches"):
            learn(*sources, "--method", method, *settings, "--steps", 5, "--no-data", "--output", root / "bare")


def test_methods_of_one_phase_say_so(sources: list[Path], root: Path) -> None:
    with pytest.raises(ConfigError, match="lora learns nothing from adapters"):
        learn(*sources, "--method", "lora", "--steps", 5, "--output", root / "learned")


def test_a_run_leaves_the_vectors_and_drops_the_network(root: Path) -> None:
    folder = run(root, "vectors", {"name": "p_tuning", "length": 4})
    found = []
    for part in ("last", "best"):
        model, _ = al.load_model(root / "model", precision="fp32", device="cpu")
        host = al.load(model, folder / part, "a")
        if part == "last":
            assert [p.shape[0] for p in host.parameters("a")] == [4]
        with torch.no_grad():
            found.append(model.eval()(torch.arange(5, 12)[None]).logits)
    assert (found[0] - found[1]).abs().max() < 1e-5  # there is one evaluation, after the last step


def test_a_run_trains_vectors_inside_of_its_rows(root: Path) -> None:
    file = root / "cloze.jsonl"
    rows = [{"prompt": f"0{a}{b}0=", "completion": b + a} for a in "abcdef" for b in "uvwxyz"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = al.load_model(root / "model", precision="fp32", device="cpu")[1]
    place = tokenizer.convert_tokens_to_ids("0")
    assert place in range(1, 7)  # the loop tries its loss on these ids, which are no template
    folder = run(root, "cloze", {"name": "p_tuning", "length": 2, "placeholder": place}, file)
    model, _ = al.load_model(root / "model", precision="fp32", device="cpu")
    ids = torch.tensor([[place, 20, 30, place, 40]])
    with torch.no_grad():
        base = model(ids).logits
        al.load(model, folder / "last")
        assert (model(ids).logits - base).abs().max() > 1e-3
