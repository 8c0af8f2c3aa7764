"""Four processes that split a base train what one trains, whoever goes on from what they leave, and end together."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import outcomes
from safetensors.torch import load_file

from tiny_folder import write_model
from tiny_runs import write_data

METHODS = ("full", "lora")
FILE = "adapter_model.safetensors"
# Five heads of six, one of keys: tables of 30, 6, 50 and 45 rows, in pieces of 8, 2, 13 and 12 for four processes.
SHAPE = {
    "hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6, "intermediate_size": 50
}  # fmt: skip
RATE = 1e-3  # of a step, and so about the largest change that one makes
CLOSE = RATE / 20  # after five of them


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("four")
    write_model(root / "model", more="!", **SHAPE)
    write_data(root / "rows.jsonl")
    return root


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Any]:
    """What happened in `four_processes.py`, by the name of the launch."""
    return outcomes("four_processes.py", root, 600)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / FILE)


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines]


def check_alike(found: Path, wanted: Path) -> None:
    for (step, loss), (same, other) in zip(losses(found), losses(wanted), strict=True):
        assert (step, loss) == (same, pytest.approx(other, rel=1e-4))
    mine, theirs = weights(found), weights(wanted)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def check_same(found: Path, wanted: Path) -> None:
    assert losses(found) == losses(wanted)
    mine, theirs = weights(found), weights(wanted)
    assert mine.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == []


@pytest.mark.slow
class TestFour:
    @pytest.mark.parametrize("method", METHODS)
    def test_four_train_what_one_trains(self, root: Path, runs: dict[str, Any], method: str) -> None:
        for name, world in ((f"{method}-alone", 1), (f"{method}-four", 4)):
            assert runs[name]["codes"] == [0] * world, runs[name]["said"]
        assert len(losses(root / f"{method}-alone")) == 5 + 3, "the last of five steps has one row"
        check_alike(root / f"{method}-four", root / f"{method}-alone")
        found, base = weights(root / f"{method}-four"), load_file(root / "model" / "model.safetensors")
        start = {key: torch.zeros(()) for key in found if "lora_B" in key}
        if method == "full":
            ours = [(key, path) for key in found for path in base if path.removesuffix(".weight") in key]
            start = {key: base[path] for key, path in ours if found[key].shape == base[path].shape}
        assert len(start) >= 14, [*found]
        for key, value in start.items():
            assert float((found[key] - value).abs().max()) > 5 * CLOSE, f"{key} moved by little more than it may differ"

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (1, 2)])
    def test_another_number_of_processes_goes_on(
        self, root: Path, runs: dict[str, Any], method: str, before: int, after: int
    ) -> None:
        name = f"{method}-{before}-{after}"
        stopped, resumed = runs[f"{name} stopped"], runs[f"{name} resumed"]
        assert stopped["codes"] == [130] * before, stopped["said"]
        split = method == "full" and before > 1  # of an adapter nothing is split, and one process has nothing to split
        assert [*sorted(stopped["parts"])] == [f"parts-2/{rank}.safetensors" for rank in range(before) if split]
        assert resumed["codes"] == [0] * after, resumed["said"]
        check_alike(root / name, root / f"{method}-alone")

    def test_whoever_is_left_of_a_split_base_says_what_happened(self, root: Path, runs: dict[str, Any]) -> None:
        killed = runs["killed"]
        assert killed["codes"] == [2, -signal.SIGKILL, 2, 2], killed["said"]
        assert killed["seconds"] < 30, "a collective alone would have waited for minutes"
        said = "".join(killed["said"])
        assert len(re.findall("error: Rank", said)) == 1
        assert re.search(r"error: Rank 1 of 4 \(on \S+, process \d+\) ended without a word", said)
        assert "--resume" in said
        assert "Traceback" not in said
        assert len(killed["parts"]) == 4, "the checkpoint of step 2"
        assert runs["killed resumed"]["codes"] == [0] * 4
        check_same(root / "killed", root / "full-four")

    def test_a_signal_to_the_launcher_saves_the_parts_of_all(self, root: Path, runs: dict[str, Any]) -> None:
        code, said = runs["launched"]["codes"][0], runs["launched"]["said"][0]
        assert code == 130, said
        step = int(re.findall(r"interrupted after step (\d+); its checkpoint is in", said)[0])
        assert 0 < step < 80
        assert "--resume --processes 2" in said
        assert "Traceback" not in said
        assert sorted(runs["launched"]["parts"]) == [f"parts-{step}/{rank}.safetensors" for rank in range(2)]
        low, high = sorted(runs["launched"]["parts"].values())
        assert low > 0.9 * high, "each saved its half"
        for name in ("launched resumed", "launched straight"):
            assert runs[name]["codes"] == [0, 0], runs[name]["said"]
        check_same(root / "launched", root / "straight")
