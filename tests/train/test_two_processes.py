"""Two processes train what one trains, are stopped, killed and resumed, and refuse what would not fit together."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launches import command, outcomes, stopped
from safetensors.torch import load_file

from adapterlab.errors import ConfigError
from adapterlab.train import signals
from adapterlab.train.ranks import check_fits, check_start, differences
from tiny_folder import write_model
from tiny_runs import make_config, write_data

FILE = "adapter_model.safetensors"
TIMED = ("seconds", "memory")


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    parts = {name: load_file(run / name / FILE) for name in ("best", "last")}
    return {f"{name} {key}": value for name, tensors in parts.items() for key, value in tensors.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    write_model(root / "model")
    write_data(root / "rows.jsonl")
    return root


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Any]:
    """What happened in `two_processes.py`, by the name of the launch."""
    return outcomes("two_processes.py", root, 280)


def rows_of(run: dict[str, Any]) -> list[int]:
    """All rows that a launch computed in training."""
    return [row for rank in run["rows"] for _, rows in rank for row in rows]


@pytest.mark.slow
class TestRanks:
    def test_two_processes_compute_what_one_does(self, root: Path, runs: dict[str, Any]) -> None:
        assert [runs[name]["codes"] for name in ("alone", "pair")] == [[0], [0, 0]], runs["pair"]["said"]
        alone, pair = metrics(root / "alone"), metrics(root / "pair")
        assert [line.keys() for line in alone] == [line.keys() for line in pair]
        for one, two in zip(alone, pair, strict=True):
            for key in one:
                assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), (key, one, two)
        expected = weights(root / "alone")
        assert all(torch.allclose(value, expected[key], atol=1e-5) for key, value in weights(root / "pair").items())
        assert sorted(rows_of(runs["pair"])) == sorted(rows_of(runs["alone"])) == [*range(54)]
        assert {p.name for p in (root / "pair").iterdir()} - {p.name for p in (root / "alone").iterdir()} == {"logs"}
        assert [p.name for p in (root / "pair" / "logs").iterdir()] == ["rank_1.log"]
        assert runs["pair"]["said"][0].count("Next:") == 1
        assert runs["pair"]["said"][1] == "", "the second rank prints into its log"

    def test_whoever_is_left_says_what_happened(self, runs: dict[str, Any]) -> None:
        first = runs["first killed"]
        assert first["codes"] == [-signal.SIGKILL, 2]
        assert first["seconds"] < 30, "the main thread of the other one would have waited for a minute"
        assert "error: Rank 0 of 2" in first["said"][1]
        raised = runs["raised"]
        assert raised["codes"] == [2, 1]
        assert re.search(r"error: Rank 1 of 2 .*failed: ValueError: boom", raised["said"][0])
        assert raised["said"][1] == ""

    def test_ranks_that_differ_are_named(self, runs: dict[str, Any]) -> None:
        assert runs["other rows"]["codes"] == [2, 2]
        said = runs["other rows"]["said"][0]
        assert re.search(r"data fingerprint: '\w+\.\.\. on rank 0; '\w+\.\.\. on rank 1", said)
        assert "data train_rows: 54 on rank 0; 44 on rank 1" in said

    def test_ranks_with_other_settings_stop_and_name_them(self, runs: dict[str, Any]) -> None:
        found = runs["other settings"]
        assert found["codes"] == [2, 2]
        assert found["seconds"] < 30
        said = found["said"][0]
        assert "The processes of this run differ in what must be the same for all" in said
        assert "training.lr: 0.01 on rank 0; 0.02 on rank 1" in said
        assert "method.r: 2 on rank 0; 3 on rank 1" in said
        assert said.count(" on rank 1") == 2, "nothing else differs"
        assert all(rows == [] for rows in found["rows"]), "and nobody has trained"

    def test_stopped_by_a_signal_to_one_rank_and_killed_the_run_goes_on_exactly(
        self, root: Path, runs: dict[str, Any]
    ) -> None:
        stopped = runs["stopped"]
        assert stopped["codes"] == [130, 130]
        assert "interrupted after step 2" in stopped["said"][0]
        assert "accelerate launch [...] -m adapterlab train" in stopped["said"][0]
        killed = runs["killed"]
        assert killed["codes"] == [2, -signal.SIGKILL]
        assert killed["seconds"] < 30
        assert re.search(r"error: Rank 1 of 2 \(on \S+, process \d+\) ended without a word", killed["said"][0])
        assert "--resume" in killed["said"][0]
        assert [runs[name]["codes"] for name in ("stream", "continued")] == [[0, 0]] * 2, runs["continued"]["said"]
        assert metrics(root / "stopped") == metrics(root / "stream")
        expected = weights(root / "stream")
        assert all(torch.equal(value, expected[key]) for key, value in weights(root / "stopped").items())
        assert sorted(rows_of(runs["stream"])) == [*range(32)], "each place of the stream once"
        assert sorted(rows_of(runs["stopped"]) + rows_of(runs["continued"])) == [*range(32)]


@pytest.mark.slow
def test_the_command_line_starts_stops_and_names_the_ranks(root: Path) -> None:
    file, output = root / "many.yaml", root / "many"
    fields = make_config(root, steps=4000, eval_every=4000, save_every=4000, warmup=0)
    file.write_text(yaml.safe_dump({**fields, "output": str(output)}))
    code, said = stopped(command(file, 2), output)
    assert code == 130, said
    assert re.search(r"interrupted after step \d+; its checkpoint is in", said)
    assert f"Continue with: adapterlab train {file} --resume --processes 2" in said
    assert "Traceback" not in said
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
    assert (output / "logs" / "rank_1.log").is_file()


def test_processes_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"4 processes do not fit 3 rows.*at most 3"):
        check_fits(4, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for key, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    check_start("cpu")
    with pytest.raises(ConfigError, match=r"do not fit its 1 GPU"):
        check_start(None)
    with pytest.raises(ConfigError, match=r"is one device, and 2 processes need one each"):
        check_start("cuda:0")
    monkeypatch.delenv("LOCAL_RANK")
    check_start(None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match=r"starts one process.*--processes N"):
        check_start(None)


def test_a_signal_that_a_launcher_passes_on_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        for window, expected in ((60.0, []), (-1.0, [signal.SIGTERM])):
            monkeypatch.setattr(signals, "_ECHO", window)
            with signals.stop_on_signals() as asked:
                assert not asked()
                signal.raise_signal(signal.SIGTERM)
                assert asked()
                signal.raise_signal(signal.SIGTERM)
            assert came == expected
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_differs_is_listed_by_rank() -> None:
    every = [{"a": 1, "b": "x" * 100}, {"a": 2, "b": "x" * 100}, {"a": 1, "b": "x" * 100, "c": None}]
    assert differences(every) == ["  a: 1 on rank 0, 2; 2 on rank 1"]
