"""What is compared, how it is named, and bad input: found before anything runs, all of it at once."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapterlab import registry
from adapterlab.cli import main
from adapterlab.compare import CompareConfig, compare, load_config, preparing
from adapterlab.compare.config import DATA, TRAIN
from adapterlab.errors import ConfigError, DataError, OutputError

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE: dict[str, Any] = {"data": {"path": "rows.jsonl"}, "budget": {"steps": 5}}


def labels(*methods: Any, **more: Any) -> list[str]:
    return [c.label for c in CompareConfig(**{**BASE, **more, "methods": methods}).contenders()]


def test_grids_patterns_and_lists_are_told_apart() -> None:
    assert labels({"lora": {"r": [8, 16]}}, "ia3") == ["lora r=8", "lora r=16", "ia3"]
    assert labels({"lora": {"targets": ["q", "v"]}}) == ["lora"], "a list that the setting takes is no grid"
    grid = {"lora": {"r": [4, 8], "targets": [["q"], ["q", "v"]]}}
    assert len(labels(grid)) == 4
    lacking = {"lora_average", "lorahub"}  # the adapters that they are made of
    assert set(labels("lora*", exclude=["lora_drop"])) == set(registry.ids("lora*")) - lacking - {"lora_drop"}
    config = CompareConfig(**BASE, methods=["lora*"])
    assert config.left_out() == {id: ["adapters"] for id in sorted(lacking)}
    with pytest.raises(ConfigError, match=r"lorahub: .* needs the setting 'adapters'"):
        labels("lorahub")
    assert labels("ia3", full=True) == ["ia3", "full"]
    assert labels({"name": "lora", "label": "mine", "r": [2, 4]}) == ["mine r=2", "mine r=4"]
    assert labels({"lora": {"r": 4}}, {"lora": {"r": 8}}) == ["lora r=4", "lora r=8"]
    contenders = CompareConfig(**BASE, methods={"lora": {"lr": [1e-4, 1e-3]}}).contenders()
    assert [c.lr for c in contenders] == [1e-4, 1e-3]
    assert len({c.key for c in contenders}) == 2


def test_all_faults_of_all_methods_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        labels({"lora": {"r": 0}}, {"lora": {"rank": 3}}, "loar", {"ia3": {"lr": "high"}}, "bitfit")
    message = str(caught.value)
    for part in ("r = 0", "'rank'", "Nearest", "loar", "lr='high'"):
        assert part in message, part
    assert "bitfit" not in message.partition("Nearest")[0]


def test_the_same_method_twice_needs_labels() -> None:
    with pytest.raises(ConfigError, match="more than once"):
        labels("lora", "lora")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": {"steps": 5, "tokens": 9}}, "exactly one"),
        ({"budget": {}}, "exactly one"),
        ({"training": {"lr": 1e-3}}, "lr decides"),
        ({"training": {"batchsize": 4}}, "batch_size"),
        ({"seeds": [1, 1]}, "once"),
        ({"methods": []}, "methods"),
        ({"methods": [{"lora": 3}]}, "received"),
        ({"level": 2}, "level"),
        ({"parallel": "fsdp"}, "Raise processes_per_run"),
        ({"cpu_offload": True}, "Raise processes_per_run"),
        ({"processes_per_run": 2, "gpus": 4}, "Set gpus to 2"),
        ({"processes_per_run": 2, "parallel": "ddp", "cpu_offload": True}, "cpu_offload goes with parallel=fsdp"),
    ],
)
def test_wrong_settings(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CompareConfig(**{**BASE, "methods": ["lora"], **change}).contenders()


def test_targets_that_the_model_lacks_are_found_before_anything_runs(
    fields: dict[str, Any], inline: Callable[..., Any]
) -> None:
    pool = inline()
    methods = [{"lora": {"targets": "q_porj"}}, {"name": "ia3", "targets": ["nowhere"]}, "bitfit"]
    with pytest.raises(ConfigError) as caught:
        compare(CompareConfig(**{**fields, "methods": methods}))
    assert "q_porj" in str(caught.value)
    assert "nowhere" in str(caught.value)
    assert not pool.started
    assert not Path(fields["output"]).exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"eval_size": 0}}, "data.eval_size"),
        ({"judge": "score", "data": {"scorer": "none"}}, "judge=loss"),
        ({"data": {"scorer": "verifier"}}, "generated task"),
        ({"validation": 100}, "validation=100"),
    ],
)
def test_rows_that_cannot_judge(
    fields: dict[str, Any], inline: Callable[..., Any], change: dict[str, Any], words: str
) -> None:
    pool = inline()
    data = {**fields["data"], **change.get("data", {})}
    if "eval_size" in data:
        del data["eval_path"]
    with pytest.raises(DataError, match=words):
        compare(CompareConfig(**{**fields, **change, "data": data}))
    assert not pool.started


def test_columns_that_a_method_reads_stand_in_the_rows_of_all_runs(fields: dict[str, Any]) -> None:
    file = Path(fields["data"]["path"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "type": i % 2}) + "\n" for i, row in enumerate(rows)))
    config = CompareConfig(**{**fields, "methods": ["lora", "loramoe"]})
    facts, _, train, held = preparing.read_rows(config, config.contenders())
    assert all(example.numbers["type"] in (0, 1) for example in (*train, *held))
    with preparing.claimed(config, overwrite=False):
        preparing.write_rows(config, facts, train, held)
    written = [json.loads(line) for line in (config.output / DATA / TRAIN).read_text().splitlines()]
    assert [row["type"] for row in written] == [example.numbers["type"] for example in train]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="nothing in column 'type'"):
        preparing.read_rows(config, config.contenders())


def test_another_comparison_in_the_folder_stays(fields: dict[str, Any], inline: Callable[..., Any]) -> None:
    def work(folder: Path) -> int:
        (folder / "failure.json").write_text(json.dumps({"reason": "x", "final": True, "attempts": 1}))
        return 1

    inline(work)
    compare(CompareConfig(**fields))
    before = {p: p.read_bytes() for p in Path(fields["output"]).rglob("*") if p.is_file()}
    with pytest.raises(ConfigError) as caught:
        compare(CompareConfig(**{**fields, "budget": {"steps": 7}, "processes": 2}))
    assert "budget.steps: 6 there, 7 now" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert "processes" not in str(caught.value)
    assert {p: p.read_bytes() for p in Path(fields["output"]).rglob("*") if p.is_file()} == before
    compare(CompareConfig(**{**fields, "budget": {"steps": 7}}), overwrite=True)
    assert yaml.safe_load((fields["output"] / "compare.yaml").read_text())["budget"]["steps"] == 7


def test_an_earlier_comparison_goes_when_the_next_one_is_written(
    fields: dict[str, Any], inline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(folder: Path) -> int:
        (folder / "failure.json").write_text(json.dumps({"reason": "x", "final": True, "attempts": 1}))
        return 1

    inline(work)
    compare(CompareConfig(**fields))
    root = Path(fields["output"])
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OutputError, match="disk is full"):
            compare(CompareConfig(**{**fields, "budget": {"steps": 7}}), overwrite=True)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    (root / "compare.yaml").unlink()
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (root / ".lock").touch()  # all that a comparison leaves that is killed at its first change
    compare(CompareConfig(**fields))


def test_a_folder_of_something_else_stays(fields: dict[str, Any], inline: Callable[..., Any]) -> None:
    inline()
    Path(fields["output"]).mkdir()
    (fields["output"] / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"compare\.yaml"):
            compare(CompareConfig(**fields), overwrite=overwrite)
    assert [p.name for p in Path(fields["output"]).iterdir()] == ["thesis.tex"]


def test_rows_that_changed_in_between(fields: dict[str, Any], inline: Callable[..., Any]) -> None:
    def work(folder: Path) -> int:
        (folder / "failure.json").write_text(json.dumps({"reason": "x", "final": True, "attempts": 1}))
        return 1

    inline(work)
    compare(CompareConfig(**fields))
    file = Path(fields["data"]["path"])
    file.write_text(file.read_text().replace("=", "!"))
    with pytest.raises(DataError, match="are not those that the comparison"):
        compare(CompareConfig(**fields))


def test_a_setting_that_an_earlier_version_did_not_have_was_its_default() -> None:
    config = CompareConfig(**{**BASE, "methods": ["lora"]})
    saved = {key: value for key, value in config.decisive().items() if key not in ("processes_per_run", "parallel")}
    assert config.differences(saved) == []
    several = config.model_copy(update={"processes_per_run": 2})
    assert several.differences(saved) == ["  processes_per_run: 1 there, 2 now"]


def test_settings_on_the_command_line_replace_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({**BASE, "data": {"task": "chain_sum", "eval_size": 9}, "methods": ["lora"]}))
    changed = load_config(file, {"data": {"path": "x.jsonl"}, "budget": {"tokens": 5}, "methods": ["ia3"]})
    assert (changed.data.path, changed.data.task, changed.data.eval_size) == ("x.jsonl", None, 9)
    assert str(changed.budget) == "5 tokens"
    assert [c.label for c in changed.contenders()] == ["ia3"]
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "absent.yaml")


def test_the_command_line_checks_without_running(fields: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(fields["output"]).parent / "c.yaml"
    plain = {**fields, "output": str(fields["output"]), "methods": ["lora", {"ia3": {"x": 1}}]}
    file.write_text(yaml.safe_dump(plain))
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(file), "--dry-run"])
    assert caught.value.code == 2
    assert "'x'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(file), "seeds=3", "--methods", "lora,ia*", "--dry-run"])
    assert caught.value.code == 0
    assert "6 runs of 6 steps" in capsys.readouterr().out
    assert not Path(fields["output"]).exists()


@pytest.mark.parametrize("name", ["compare_smollm2.yaml", "compare_gsm8k.yaml", "compare_slurm.yaml"])
def test_examples_are_valid(name: str) -> None:
    config = load_config(EXAMPLES / name)
    assert len(config.contenders()) >= 4
    if "smollm2" in name:
        wanted = "lora r=8, lora r=16, rslora, lora_plus, dora, ia3, prefix_tuning, bitfit, adapter_pfeiffer"
        assert [c.label for c in config.contenders()] == wanted.split(", ")
