"""Runs of methods that route tokens: columns that they read, and what their experts are used, down to pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import adapterlab as al
from adapterlab.cli import build
from adapterlab.core import usage
from adapterlab.errors import DataError
from adapterlab.train import RunResult, fit
from adapterlab.train.trackers import Trackers

Config = Callable[..., dict[str, Any]]
METHOD = {"name": "loramoe", "experts": 4, "r": 2, "column": "kind", "targets": ["up", "down"]}


def with_kinds(root: Path, *kinds: Any) -> Path:
    """The rows again, each with a kind in turn."""
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    rows = [row | {"kind": kinds[i % len(kinds)]} for i, row in enumerate(rows)]
    file = root / "kinds.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def fields(config: Config, root: Path, **training: Any) -> dict[str, Any]:
    made = config(**{"steps": 5, "log_every": 2, "epochs": None, **training})
    return {**made, "method": METHOD, "data": {**made["data"], "path": str(with_kinds(root, 0, 1))}}


def metrics(root: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_run_shows_what_experts_are_used(config: Config, root: Path) -> None:
    result = fit(fields(config, root), quiet=True)
    assert isinstance(result, RunResult)
    assert "routers" not in result.outcome
    seen = {line["step"]: line.get("load") for line in metrics(root)}
    assert [step for step, load in seen.items() if load] == [2, 4, 5]
    host = al.load(al.load_model(str(root / "model"), precision="fp32", device="cpu")[0], result.last)
    paths = [path for path in host.adapters("default") if path]
    for load in (seen[2], seen[5]):
        assert list(load) == paths  # type: ignore[arg-type]
        assert all(len(share) == 4 and abs(sum(share) - 1) < 1e-3 for share in load.values())  # type: ignore[union-attr]
    assert "kind" in json.loads((root / "run" / "run.json").read_text())["data"]["columns"]["used"]

    def call(*args: str) -> str:
        given = ["analyze", str(root / "run"), *args]
        found = CliRunner().invoke(build(), given, env={"COLUMNS": "80"}, catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return str(found.stdout)

    out = call("--output", str(root / "report"))
    assert "share of the weight that experts got at step 5" in out
    assert "up x 2" in out
    assert max(len(line) for line in out.splitlines() if str(root) not in line) <= 80
    assert (root / "report" / "analysis.png").read_bytes()[:4] == b"\x89PNG"
    told = json.loads(call("--json"))["run"]["load"]
    assert told["step"] == 5
    assert told["shares"] == seen[5]
    assert [entry["step"] for entry in told["history"]] == [2, 4, 5]
    assert all(1 <= value <= 4.001 for value in told["effective"].values())


def test_kinds_that_are_wrong_or_missing_are_refused_before_training(config: Config, root: Path) -> None:
    made = fields(config, root)
    with_kinds(root, 0, 7)
    with pytest.raises(DataError, match=r"row 2 of kinds.jsonl: column 'kind' is 7, and the method reads one of 0, 1"):
        fit(made, quiet=True)
    with pytest.raises(DataError, match="nothing in column 'kind'"):
        fit({**made, "data": {**made["data"], "path": str(root / "rows.jsonl")}}, quiet=True)


def test_a_router_that_collapsed_is_named(config: Config, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = al.method("loramoe").Layer
    plain, alone = layer.routed, torch.tensor([0.0, 1.0, 0.0, 0.0])

    def routed(self: Any, x: Any, z: Any, chosen: Any, w: torch.Tensor) -> None:
        plain(self, x, z, chosen, 0.02 * w + 0.98 * alone if self.site.role == "down" else w)

    monkeypatch.setattr(layer, "routed", routed)
    result = fit(fields(config, root), quiet=True)
    assert result is not None
    assert "95% of the weight in 2 of 4 modules: model.layers.0.mlp.down_proj (1), " in result.outcome["routers"]


def test_shares() -> None:
    """Sums of several processes, of which one had no batch."""
    load = usage.shares([{"a.q_proj": [3.0, 1.0], "b.q_proj": [0.0, 0.0]}, {}, {"a.q_proj": [1.0, 3.0]}])
    assert load == {"a.q_proj": [0.5, 0.5]}
    assert usage.even([0.25] * 4) == pytest.approx(4)
    assert usage.even([0.0, 1.0]) == pytest.approx(1)
    load = {"a.q_proj": [0.96, 0.04], "b.q_proj": [0.5, 0.5]}
    assert usage.means(load) == pytest.approx(
        {"load/largest": 0.73, "load/effective": (usage.even([0.96, 0.04]) + 2) / 2}
    )
    assert usage.collapsed(load).endswith("in 1 of 2 modules: a.q_proj (0)")
    assert usage.collapsed({"a.q_proj": [0.96, 0.04]}).endswith("in all 1 modules (q)")
    assert usage.collapsed({"a.q_proj": [0.95, 0.05], "b.q_proj": [1.0]}) == ""


def test_trackers_get_means_alone() -> None:
    sent: list[dict[str, Any]] = []
    trackers = Trackers({})
    trackers.open = [SimpleNamespace(name="kept", log=lambda values, step: sent.append(values))]
    loop: Any = SimpleNamespace(training=SimpleNamespace(log_every=1))
    trackers.stepped(loop, {"step": 1, "loss": 2.0, "load": {"a": [0.75, 0.25], "b": [0.25, 0.75]}})
    trackers.stepped(loop, {"step": 2, "loss": 1.0})
    effective = usage.even([0.75, 0.25])
    wanted = {"train/loss": 2.0, "train/load/largest": 0.75, "train/load/effective": pytest.approx(effective)}
    assert sent == [wanted, {"train/loss": 1.0}]
