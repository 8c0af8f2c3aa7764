"""Runs in which no gradient is computed: a search that a loop drives, and methods that are ready as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_resume import StopAfter, metrics, same, weights

import adapterlab as al
from adapterlab.errors import ConfigError
from adapterlab.io import read_info
from adapterlab.models import load_model
from adapterlab.plan.planning import plan
from adapterlab.train import Interrupted, fit
from adapterlab.train.sampler import Sampler
from tiny_runs import cli

Config = Callable[..., dict[str, Any]]


@pytest.fixture
def library(root: Path) -> dict[str, str]:
    """Two adapters of a folder each, with values as training would leave them; one lies in a run's folder."""
    model, _ = load_model(str(root / "model"), precision="fp32", device="cpu")
    host = al.attach(model, al.LoRA(r=2, targets=["q", "v", "down"]))
    folders = {"one": root / "one", "two": root / "two" / "best"}
    for seed, folder in enumerate(folders.values()):
        draw = torch.Generator().manual_seed(seed)
        for p in host.parameters("default"):
            p.data = 0.4 * torch.randn(p.shape, generator=draw)
        host.save(folder)
    return {"one": str(root / "one"), "two": str(root / "two")}


def test_a_search_is_a_run(
    config: Config, library: dict[str, str], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line: as many evaluations as the budget says, and a plain LoRA that needs no library."""
    fields = config(steps=None, epochs=None, accumulation=1, save_every=100, eval_every=4, warmup=500)
    fields["method"] = {"name": "lorahub", "budget": 12, "examples": 6, "penalty_weight": 0.0}
    (root / "run.yaml").write_text(yaml.safe_dump(fields))
    adapters = [f"method.adapters.{part}={folder}" for part, folder in library.items()]
    assert cli("train", str(root / "run.yaml"), *adapters) == 0
    out = capsys.readouterr().out
    assert "12 of 6 rows" in out
    assert "step 12/12" in out
    assert "after 12 evaluations" in out
    assert f"adapterlab evaluate {root / 'run'}" in out
    lines = [line for line in metrics(root / "run") if "loss" in line]
    assert len(lines) == 12
    info = read_info(root / "run" / "last")
    assert info.fields["adapters"] == library
    assert any(info.fields["coefficients"].values()) == (min(line["loss"] for line in lines) < lines[0]["loss"])
    shutil.rmtree(root / "one")  # what was found stands by itself
    for part in ("best", "last"):
        assert all(".lora_" in key for key in load_file(root / "run" / part / "adapter_model.safetensors"))
        again, _ = load_model(str(root / "model"), precision="fp32", device="cpu")
        assert al.load(again, root / "run" / part).methods["default"].id == "lorahub"
        (root / "run" / part / "method.json").unlink()
        again, _ = load_model(str(root / "model"), precision="fp32", device="cpu")
        assert al.load(again, root / "run" / part).methods["default"].id == "lora"
    assert cli("train", str(root / "run.yaml"), *adapters, "--overwrite") == 2
    assert "adapters['one']" in capsys.readouterr().err


def test_a_search_goes_on_after_an_interruption(config: Config, library: dict[str, str], root: Path) -> None:
    fields = config(steps=10, epochs=None, accumulation=1, eval_every=5)
    fields["method"] = {"name": "lorahub", "adapters": library, "sigma": 1.0}
    whole = fit({**fields, "output": str(root / "whole")}, quiet=True)
    with pytest.raises(Interrupted):
        fit(fields, quiet=True, callbacks=[StopAfter(4)])
    rest = fit(fields, quiet=True, resume=True)
    assert whole is not None
    assert rest is not None
    assert metrics(root / "run") == metrics(root / "whole")
    assert rest.outcome == whole.outcome
    for part in ("best", "last"):
        assert same(weights(root / "run", part), weights(root / "whole", part))
        assert read_info(root / "run" / part).fields == read_info(root / "whole" / part).fields
    assert fit(fields, quiet=True, resume=True) == rest


@pytest.mark.parametrize("method", ["lora_average", "arrow"])
def test_what_is_ready_is_evaluated_and_written(
    method: str, config: Config, library: dict[str, str], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No step is made, whatever the settings say, and that is said together with what to do."""
    fields = {**config(steps=7, epochs=None), "method": {"name": method, "adapters": library}}
    assert fit(fields, quiet=True, dry_run=True) is None
    result = fit(fields)
    assert result is not None
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{method} has nothing to train: attached it is ready. Evaluate it" in shown
    assert "train loss" not in shown
    assert (result.steps, result.trainable, result.tokens) == (0, 0, 0)
    assert result.best_step == 0
    assert result.best is not None
    assert json.loads((root / "run" / "run.json").read_text())["status"] == "finished"
    again = fit(fields, resume=True)
    assert again is not None
    assert again.best == result.best
    capsys.readouterr()
    assert cli("evaluate", str(result.folder), "--json", "--max-new-tokens", "2") == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(result.eval_loss, abs=1e-4)


def test_a_plan_says_that_there_is_nothing_to_plan(root: Path) -> None:
    for id in ("arrow", "lora_average"):
        with pytest.raises(ConfigError, match=f"{id} has nothing to train.*no step to plan"):
            plan(root / "model", {"name": id, "adapters": {"one": "nowhere"}})


def test_a_step_of_all_rows_has_each_once() -> None:
    sampler = Sampler([5, 3, 9, 4, 7], seed=0, batch_size=2, batches=3, whole=True)
    assert sampler.per_step == 5
    for step in range(3):
        batches = sampler.step(step)
        assert [len(batch) for batch in batches] == [2, 2, 1]
        assert sorted(row for batch in batches for row in batch) == [0, 1, 2, 3, 4]
        assert sampler.epoch(step) == step
