"""Advice: the rules, the planner's limits, and comparisons of the past."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fabricate import fabricate
from torch import nn

import adapterlab as al
from adapterlab.cli import main
from adapterlab.compare import advice
from adapterlab.compare.advice import advise
from adapterlab.data import DataConfig
from adapterlab.errors import ConfigError
from adapterlab.train import TrainConfig

GB = 2**30


@dataclass(frozen=True)
class Quick:
    """Stands for a plan: weights, and activations that grow with the batch."""

    process: int
    limit: int
    base: int
    batch: int
    length: int
    recompute: str
    quantize: str | None
    trainable: int

    def fits(self, limit: int) -> bool:
        return self.process <= limit


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planner that answers at once."""

    def plan(
        model: str, method: Any, *, batch: int, length: int, device: str, quantize: Any = None, recompute: str = "none",
        trust_remote_code: bool = False,
    ) -> Quick:  # fmt: skip
        assert not trust_remote_code
        parameters = {"smollm2-135m": 135e6, "qwen2.5-7b": 7.6e9}[model]
        weights = parameters * (0.6 if quantize else 2)
        each = {"none": 8, "cheap": 4, "full": 1}[recompute] * length * parameters**0.5 * 10
        limit = int(float(device.removeprefix("cuda:").removesuffix("GB")) * GB)
        need, trainable = int(weights + batch * each), int(0.002 * parameters * method["r"])
        return Quick(need, limit, int(2 * parameters), batch, length, recompute, quantize, trainable)

    monkeypatch.setattr(advice, "plan", plan)


def rows(folder: Path, count: int, words: int = 5) -> DataConfig:
    file = folder / f"rows{count}-{words}.jsonl"
    row = json.dumps({"prompt": "say it", "completion": "word " * words})
    file.write_text(f"{row}\n" * count)
    return DataConfig(path=str(file), eval_size=1)


def values(found: advice.Advice) -> dict[str, Any]:
    return {rule.key: rule.value for rule in found.rules}


@pytest.mark.usefixtures("quick")
def test_rules_follow_rows_and_answers(tmp_path: Path) -> None:
    few = values(advise("smollm2-135m", rows(tmp_path, 100), memory=8 * GB))
    many = values(advise("smollm2-135m", rows(tmp_path, 20_000), memory=8 * GB))
    hard = values(advise("smollm2-135m", rows(tmp_path, 100, words=400), memory=8 * GB))
    assert (few["method.r"], many["method.r"], hard["method.r"]) == (8, 32, 16)
    assert all(v["method.alpha"] == 32 for v in (few, many, hard))
    assert all(v["method.targets"] == "all-linear" for v in (few, many, hard))
    assert few["training.epochs"] > many["training.epochs"]
    assert few["training.lr"] == pytest.approx(15 * 5e-5), "a run of 50 steps"
    assert many["training.lr"] == pytest.approx(10 * 5e-5)
    for v in (few, many, hard):
        assert v["training.batch_size"] * v["training.accumulation"] in (8, 16)


@pytest.mark.parametrize(("answer", "rank"), [(100, 64), (200, 128), (400, 256), (40_000, 256)])
def test_the_rank_holds_what_the_answers_say(answer: int, rank: int) -> None:
    """A hundred thousand rows, and 300 thousand parameters for each rank."""
    facts = advice.Facts(100_000, 500, 900, answer, False, int(1e8), 300_000, None)
    found = advice._rank(facts)
    assert found.value == rank
    assert rank in (advice._MOST_RANK, 64) or rank * facts.each_rank >= facts.rows * facts.answer
    assert (found.source == advice.REGRET) == (rank > 64)


def test_with_alpha_fixed_the_first_step_is_as_large_for_every_rank() -> None:
    """Why one rate serves all ranks: what a step of Adam on B gains does not depend on r, and with s fixed it does."""
    torch.manual_seed(0)
    gains = {}
    for r in (4, 16, 64):
        layer = nn.Linear(128, 96, bias=False)
        model = nn.Sequential(layer)
        host = al.attach(model, al.LoRA(r=r, alpha=advice._ALPHA, targets=["0"]))
        adapter = host.adapters("default")["0"]
        slope = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
        (slope * adapter.delta()).sum().backward()
        optimizer = torch.optim.Adam(host.parameters("default"), lr=1e-3)
        optimizer.step()
        gains[r] = -float((slope * adapter.delta()).sum())
    assert max(gains.values()) < 1.15 * min(gains.values())


@pytest.mark.usefixtures("quick")
def test_advice_is_a_training_configuration_with_sources(tmp_path: Path) -> None:
    found = advise("smollm2-135m", rows(tmp_path, 100), memory=8 * GB)
    config = TrainConfig(**found.config())
    assert config.make_method().alpha == 32
    assert config.make_method().dropout == 0
    for rule in found.rules:
        assert rule.why
        assert any(mark in rule.source for mark in ("arXiv", "doi", "planner")), rule
    assert found.plan is not None
    assert found.plan.process <= 8 * GB


@pytest.mark.usefixtures("quick")
def test_what_was_measured_is_cited_and_does_not_speak_for_larger_models(tmp_path: Path) -> None:
    small = advise("smollm2-135m", rows(tmp_path, 100), memory=8 * GB).tested
    large = advise("qwen2.5-7b", rows(tmp_path, 100), memory=80 * GB).tested
    assert any(said.startswith("method.r: ") and "docs/rules.md" in said for said in small)
    assert not any("cannot speak" in said for said in small)
    assert large[:-1] == small
    assert "135M parameters and cannot speak for 7.6B" in large[-1]


@pytest.mark.usefixtures("quick")
def test_settings_say_what_was_tested_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {
        "key": "method.alpha", "rule": "alpha is large", "verdict": "holds here", "figures": {"it is": "+1 (0 to 2)"},
        "model": "tiny", "parameters": 1, "source": "docs/rules.md#alpha",
    }  # fmt: skip
    monkeypatch.setattr(advice, "_evidence", lambda: [entry])
    found = advise("smollm2-135m", rows(tmp_path, 100), memory=8 * GB)
    said = {rule.key: rule.tested for rule in found.rules}
    assert said.pop("method.alpha") == ("“alpha is large” holds here (tiny)",)
    assert set(said.values()) == {()}
    assert found.tested[0] == "method.alpha: “alpha is large” holds here. it is: +1 (0 to 2) (docs/rules.md#alpha)."


@pytest.mark.usefixtures("quick")
def test_memory_decides_on_packing_and_batch(tmp_path: Path) -> None:
    data = rows(tmp_path, 1000)
    roomy = values(advise("qwen2.5-7b", data, memory=80 * GB))
    tight = values(advise("qwen2.5-7b", data, memory=12 * GB))
    assert "quantize" not in roomy
    assert tight["quantize"] == "nf4"
    with pytest.raises(ConfigError, match="does not fit"):
        advise("qwen2.5-7b", data, memory=2 * GB)


@pytest.mark.usefixtures("quick")
def test_a_comparison_on_the_same_rows_goes_first(tmp_path: Path) -> None:
    data = rows(tmp_path, 100)
    past = fabricate("sums", methods=("dora", "bitfit"), failed=False)
    past = past.model_copy(update={"config": {"model": "smollm2-135m", "data": data.model_dump(mode="json")}})
    folder = tmp_path / "comparisons" / "sums"
    folder.mkdir(parents=True)
    past.save(folder)
    (tmp_path / "comparisons" / "broken").mkdir()
    (tmp_path / "comparisons" / "broken" / "comparison.json").write_text("{")
    found = advise("smollm2-135m", data, memory=8 * GB, folder=tmp_path)
    assert values(found)["method.name"] == "dora"
    assert values(found)["training.lr"] == 1e-3
    assert "dora came first" in found.past[0]
    assert TrainConfig(**found.config()).method["name"] == "dora"
    other = advise("smollm2-135m", rows(tmp_path, 101), memory=8 * GB, folder=tmp_path)
    assert values(other)["method.name"] == "lora"
    assert "other rows" in other.past[0]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, file = str(rows(tmp_path, 60).path), tmp_path / "start.yaml"
    common = ["advise", "smollm2-135m", data, "--memory", "8GB", "--past", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main([*common, "--write", str(file)])
    assert ended.value.code == 0
    assert "arXiv" in capsys.readouterr().out
    from adapterlab.train import load_config

    assert load_config(file)[0].data.path == data
    with pytest.raises(SystemExit) as ended:
        main([*common[:3], "--memory", "much"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "much" in message
    assert "24GB" in message
