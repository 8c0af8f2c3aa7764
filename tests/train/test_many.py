"""Several configurations at once: their folders, what runs by itself, wrong input, resuming, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from adapterlab.errors import ConfigError, DataError, OutputError
from adapterlab.io.folder import read_info
from adapterlab.train import Interrupted, Listener, Loop, RunResult, fit, fit_many
from tiny_runs import cli

Config = Callable[..., dict[str, Any]]


def several(config: Config, root: Path) -> dict[str, dict[str, Any]]:
    """Runs that differ in everything but their base; the last one trains the base itself."""
    methods = {
        "long": ({"name": "lora", "r": 2, "dropout": 0.2, "targets": ["q", "v", "down"]}, {"steps": 6}),
        "short": ({"name": "ia3"}, {"steps": 3, "accumulation": 1, "seed": 3, "eval_every": 2}),
        "inside": ({"name": "ln_tuning"}, {"steps": 2}),
    }
    made = {}
    for name, (method, training) in methods.items():
        made[name] = {**config(**{"epochs": None, **training}), "method": method, "output": str(root / name)}
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "adapter_model.safetensors")


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines]


def test_each_run_leaves_what_it_leaves_by_itself(config: Config, root: Path) -> None:
    runs = several(config, root)
    endings = fit_many(list(runs.values()), quiet=True)
    assert [ending.name for ending in endings] == [str(root / name) for name in runs]
    assert [bool(ending.why) for ending in endings] == [False, False, True]
    assert "base's own weights" in endings[2].why
    for ending, (name, fields) in zip(endings, runs.items(), strict=True):
        found = ending.value
        wanted = fit({**fields, "output": str(root / "alone" / name)}, quiet=True)
        assert isinstance(found, RunResult)
        assert wanted is not None
        assert found.folder == root / name
        for key in ("steps", "epochs", "tokens", "proven", "trainable", "total", "best_step"):
            assert getattr(found, key) == getattr(wanted, key), key
        for (step, loss), (same, other) in zip(losses(found.folder), losses(wanted.folder), strict=True):
            assert (step, loss) == (same, pytest.approx(other, rel=1e-4))
        mine, theirs = weights(found.folder), weights(wanted.folder)
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-5, msg=key)
        facts, expected = (json.loads((r.folder / "run.json").read_text()) for r in (found, wanted))
        assert facts["status"] == "finished"
        assert facts["model"] == expected["model"]
        assert facts["together"] == [str(root / other) for other in runs if other != name]
        assert read_info(found.last).name == read_info(wanted.last).name


def test_a_run_of_several_goes_on_by_itself_and_the_other_way_round(config: Config, root: Path) -> None:
    class Stops(Listener):
        def settled(self, loop: Loop) -> None:
            if loop.total == 3 and loop.status.step == 2:
                os.kill(os.getpid(), 2)

    runs = list(several(config, root).values())[:2]
    with pytest.raises(Interrupted, match="its checkpoint is in") as caught:
        fit_many(runs, quiet=True, exact=True, callbacks=[Stops()])
    assert caught.value.step in (1, 2)
    assert {json.loads((root / name / "run.json").read_text())["status"] for name in ("long", "short")} == {
        "interrupted"
    }
    assert fit(runs[1], resume=True, quiet=True) is not None
    endings = fit_many(runs, resume=True, quiet=True, exact=True)
    straight = fit({**runs[0], "output": str(root / "straight")}, quiet=True)
    assert [ending.value.steps for ending in endings] == [6, 3]
    assert straight is not None
    found = weights(root / "long")
    assert all(torch.equal(found[key], value) for key, value in weights(straight.folder).items())


@pytest.mark.parametrize("passes", ["exact", "shared"])
def test_a_killed_process_is_gone_on_with(root: Path, passes: str) -> None:
    command = [sys.executable, Path(__file__).parent / "kill_together.py", root, passes]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=one_thread)
    assert done.returncode == 0, done.stderr
    for name in ("long", "short"):
        killed, straight = root / "killed" / name, root / "straight" / name
        found, wanted = weights(killed), weights(straight)
        assert found.keys() == wanted.keys()
        if passes == "exact":
            assert losses(killed) == losses(straight)
            assert all(torch.equal(found[key], value) for key, value in wanted.items())
            continue
        for (step, loss), (same, other) in zip(losses(killed), losses(straight), strict=True):
            assert (step, loss) == (same, pytest.approx(other, rel=1e-4))
        for key, value in wanted.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-4 * scale, msg=f"{name}, {key}")


def test_a_run_that_fails_is_named_and_the_others_end(config: Config, root: Path) -> None:
    runs = list(several(config, root).values())[:2]
    runs[0]["data"] = {"path": str(root / "none.jsonl")}
    lost, sound = fit_many(runs, quiet=True)
    assert isinstance(lost.error, DataError)
    assert sound.value.steps == 3
    assert not (root / "long").exists(), "nothing came of it"


def test_runs_that_do_not_belong_together_are_refused(config: Config, root: Path) -> None:
    long, short, _ = several(config, root).values()
    with pytest.raises(ConfigError, match=r"share one base(.|\n)*precision: 'fp32' and 'bf16'"):
        fit_many([long, {**short, "precision": "bf16"}], quiet=True)
    with pytest.raises(ConfigError, match=r"share one base(.|\n)*parallel: 'auto' and 'fsdp'"):
        fit_many([long, {**short, "parallel": "fsdp"}], quiet=True)
    with pytest.raises(ConfigError, match=r"Runs 1 and 2 both write to .*long"):
        fit_many([long, {**short, "output": long["output"]}], quiet=True)
    with pytest.raises(ConfigError, match="no run"):
        fit_many([], quiet=True)
    (root / "short").mkdir()
    (root / "short" / "thesis.txt").write_text("important")
    with pytest.raises(OutputError, match="not empty"):
        fit_many([long, short], quiet=True)
    assert not (root / "long").exists()


@pytest.fixture
def files(config: Config, root: Path) -> list[str]:
    made = []
    for name, fields in list(several(config, root).items())[:2]:
        (root / f"{name}.yaml").write_text(yaml.safe_dump(fields))
        made.append(str(root / f"{name}.yaml"))
    return made


def test_the_command_line_trains_several(files: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("train", *files, "training.steps=2", "--together") == 0
    out = capsys.readouterr().out
    assert f"{root / 'long'} shares passes" in out
    assert f"{root / 'short'}: step 2/2" in out
    assert "Products of 32 and more rows" in out
    assert f"adapterlab evaluate {root / 'long'}" in out
    facts = json.loads((root / "short" / "run.json").read_text())
    assert facts["provenance"]["training.steps"] == "command line"
    assert cli("train", *files, "training.steps=2", "--together", "--resume") == 0
    assert "finished already" in capsys.readouterr().out
    (root / "rows.jsonl").unlink()
    assert cli("train", *files, "--together", "--overwrite", "--quiet") == 1
    assert "long failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--exact"], "--together"),
        (["OTHER"], "--together"),
        (["OTHER", "--together", "--dry-run"], "tries one run"),
        (["OTHER", "--together", "output=here"], "both write to"),
        (["OTHER", "--together", "training.lrr=1"], "training.lr"),
        (["none.yaml", "--together"], "none.yaml"),
    ],
)
def test_wrong_words_are_named(
    words: list[str], said: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("train", files[0], *(files[1] if word == "OTHER" else word for word in words)) == 2
    assert said in " ".join(capsys.readouterr().err.split())
