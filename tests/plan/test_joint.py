"""Plans of runs that share a base: what they need together, who begins at once, the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapterlab.plan import Device, Plan, before_run, together
from adapterlab.plan import planning as planning_module
from adapterlab.plan.before_run import needed
from adapterlab.plan.process import figures
from adapterlab.train.config import TrainConfig
from tiny_runs import cli

MB = 2**20


def made(process: int, limit: int | None, base: int = 100 * MB, kind: str = "cpu") -> Plan:
    return Plan(
        model="m", method="lora", settings={}, device=Device(kind, limit, None, kind), batch=1, length=8,
        precision="bf16", quantize=None, recompute="none", peak=process // 2, moment="", process=process,
        band=(0.02, 0.05), parts={}, layers=[0], trainable=1, base=base, adapter=0, state=0, flops=1.0, seconds=None,
        limit=limit, loss="chunked",
    )  # fmt: skip


def test_needs_add_up_beside_one_base() -> None:
    constants = figures()["constants"]
    base = round(constants["libraries"] + constants["resting"] * 100 * MB)
    limit = base + 500 * MB
    joint = together([made(base + need * MB, limit) for need in (200, 250, 100, 40)])
    assert joint.base == base
    assert joint.needs == [200 * MB, 250 * MB, 100 * MB, 40 * MB]
    assert joint.process == base + 590 * MB
    assert joint.at_once == [True, True, False, True], "the third has no room beside the first two"
    assert joint.verdict == "tight" if joint.process * 0.95 <= limit else "does not fit"
    assert joint.to_json()["separate_processes"] == 4 * base + 590 * MB
    unknown = together([made(base + 200 * MB, None)] * 3)
    assert (unknown.at_once, unknown.verdict, unknown.room) == ([True] * 3, "unknown", None)
    gpu = made(4000 * MB, 8000 * MB, kind="cuda")
    assert together([gpu]).base == round(1.06 * 100 * MB) + gpu.device.context


@pytest.fixture
def configs(tmp_path: Path) -> list[TrainConfig]:
    data = {"path": str(tmp_path / "rows.jsonl"), "max_length": 32}
    return [TrainConfig(model="m", data=data, output=tmp_path / name, device="cpu") for name in ("a", "b", "c")]


def test_a_run_without_a_plan_has_the_room_for_itself(
    configs: list[TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = {"a": made(2000 * MB, 4000 * MB), "b": None, "c": made(2500 * MB, 4000 * MB)}
    monkeypatch.setattr(before_run, "is_trifle", lambda config: False)
    monkeypatch.setattr(before_run, "early_plan", lambda config, *_: plans[config.output.name])
    told: list[str] = []
    room, needs = needed(configs, told.append, make=False)
    joint = together([plans["a"], plans["c"]])  # type: ignore[list-item]
    assert (room, needs) == (joint.room, [joint.needs[0], None, joint.needs[1]])
    assert "no plan" in " ".join(told)
    monkeypatch.setattr(before_run, "is_trifle", lambda config: True)
    assert needed(configs, told.append) == (None, [0, 0, 0])


def test_the_command_line_plans_several(
    configs: list[TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(config: TrainConfig, **changes: Any) -> Plan:
        return replace(made(1500 * MB, 2000 * MB), method=config.method["name"])

    monkeypatch.setattr(planning_module, "plan_config", planned)
    files = []
    for config, method in zip(configs[:2], ("lora", "dora"), strict=True):
        file = tmp_path / f"{config.output.name}.yaml"
        file.write_text(yaml.safe_dump({**config.model_dump(mode="json"), "method": method}))
        files.append(str(file))
    assert cli("plan", *files, "--together", "--json", "--speed", "1") == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["plan"]["method"] for run in found["runs"]] == ["lora", "dora"]
    assert cli("plan", *files, "--together", "--speed", "1") == 0
    shown = capsys.readouterr().out
    assert "All at once" in shown
    assert "begins" in shown
    assert cli("plan", *files) == 2
    assert "--together" in capsys.readouterr().err
    assert cli("plan", *files, "--together", "--batch", "4") == 2
    assert "--batch" in capsys.readouterr().err
    assert cli("plan", files[0], files[0], "--together") == 2
    assert "both write to" in capsys.readouterr().err
