"""Whole comparisons of a tiny model: what is measured, what is ranked, what is kept."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inline_comparisons import small_comparison, use_inline_pool

import adapterlab as al
from adapterlab import io
from adapterlab.compare import CompareConfig, compare, load, worker
from adapterlab.compare.results import UNTRAINED
from adapterlab.data import DataConfig
from adapterlab.evaluate import score
from adapterlab.models import load_model
from tiny_folder import write_model

LORA = {"name": "lora", "r": 4, "targets": "all-linear"}


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """Two names for one method, one that cannot learn, one that is another method; two seeds. And the settings."""
    fields = small_comparison(tiny_base, tmp_path_factory.mktemp("whole"))
    methods = [{**LORA, "label": "first"}, {**LORA, "label": "second"}, {**LORA, "label": "broken", "lr": 0.0}, "ia3"]
    with pytest.MonkeyPatch.context() as patch:
        use_inline_pool(patch)
        config = CompareConfig(**{**fields, "methods": methods, "seeds": 2, "budget": {"steps": 20}})
        return compare(config), fields


def test_a_comparison_measures_ranks_and_recommends(made: Any) -> None:
    whole, fields = made
    place = {s.label: s for s in whole.standings}
    difference = next(d for d in whole.differences if {d.a, d.b} == {"first", "second"})
    assert difference.value == 0
    assert difference.p == 1
    assert not difference.distinct
    assert place["first"].rank == place["second"].rank
    assert "second" in place["first"].tied

    assert whole.standings[-1].label == "broken"
    assert place["broken"].rank is None
    assert place["broken"].failed == 2
    assert "did not train" in place["broken"].reason
    assert "broken" in whole.recommendation.text
    assert whole.recommendation.best in {"first", "second", "ia3"}

    for run in whole.runs:
        if run.status == "finished" and not run.is_untrained:
            missing = {name for name in type(run).model_fields if getattr(run, name) in (None, [])}
            shared = run.together > 1
            assert shared == (run.seed > 0)
            assert missing == ({"memory", "train_seconds"} if shared else set()), run.label
            assert run.steps == 20
            assert len(run.train_curve) == 20
            assert run.attempts == 1
    same = {run.tokens for run in whole.runs if run.seed == 0 and run.steps}
    assert len(same) == 1, "all methods train on the same tokens"
    assert load(fields["output"]) == whole


def test_figures_agree_with_the_evaluation_of_the_same_adapter(made: Any) -> None:
    whole, fields = made
    run = whole.runs_of("first")[0]
    folder = fields["output"] / "runs" / run.key / "seed0" / "train" / "best"
    model, tokenizer = load_model(fields["model"], precision="fp32", device="cpu")
    base = score(model, tokenizer, data=DataConfig(**fields["data"]), max_new_tokens=4)
    untrained = whole.runs_of(UNTRAINED)[0]
    assert untrained.best.loss == pytest.approx(base.loss, abs=1e-5)
    host = al.load(model, folder)
    found = score(host, tokenizer, data=DataConfig(**fields["data"]), max_new_tokens=4)
    assert run.best.loss == pytest.approx(found.loss, abs=1e-5)
    assert run.best.score == found.score
    assert run.best.interval == pytest.approx(found.interval)
    assert run.adapter_bytes == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    text = Path(io.__file__).parents[1] / "compare" / "general.txt"
    ids = torch.tensor([tokenizer(text.read_text())["input_ids"]])
    with torch.no_grad():
        losses = [model(input_ids=b, labels=b).loss * (b.shape[1] - 1) for b in ids.split(64, dim=1) if b.shape[1] > 1]
    counted = sum(b.shape[1] - 1 for b in ids.split(64, dim=1) if b.shape[1] > 1)
    assert run.general_loss == pytest.approx(float(sum(losses)) / counted, abs=1e-4)
    assert run.forgetting == pytest.approx(run.general_loss - untrained.general_loss)


def test_only_best_and_last_adapters_stay(made: Any) -> None:
    for train in (made[1]["output"] / "runs").glob("*/*/train"):
        assert {p.name for p in train.iterdir() if p.is_dir()} <= {"best", "last", "checkpoint"}
        assert not list(train.glob("checkpoint/*"))


def test_finished_runs_are_kept_and_lost_ones_done_again(fields: dict[str, Any], inline: Callable[..., Any]) -> None:
    pool = inline()
    config = CompareConfig(**{**fields, "methods": [LORA, "ia3"]})
    first = compare(config)
    assert len(pool.started) == 3
    gone = fields["output"] / "runs" / "ia3" / "seed0"
    shutil.rmtree(gone)
    second = compare(config)
    assert pool.started[3:] == [gone]
    assert [r.best for r in second.runs] == [r.best for r in first.runs]


def test_rates_are_searched_on_rows_that_judge_nothing(fields: dict[str, Any], inline: Callable[..., Any]) -> None:
    inline()
    search = {"rates": 3, "fractions": [0.5, 1.0], "extend": 1}
    result = compare(CompareConfig(**{**fields, "methods": [LORA], "lr": "auto", "search": search}))
    found = result.searches[0]
    assert [len(trials) for trials in found.rounds] in ([3, 2], [4, 2], [3, 3])
    assert [t.lr for t in found.rounds[0]] == sorted(t.lr for t in found.rounds[0])
    assert found.chosen == min(found.rounds[1], key=lambda t: t.loss).lr
    assert {run.lr for run in result.runs_of("lora")} == {found.chosen}
    held = (fields["output"] / "data" / "held.jsonl").read_text().splitlines()
    train = (fields["output"] / "data" / "train.jsonl").read_text().splitlines()
    given = Path(fields["data"]["path"]).read_text().splitlines()
    assert (len(held), len(train)) == (8, 72)
    shown = [f"{row['prompt']}{row['completion']}" for row in map(json.loads, given)]
    again = ["".join(m["content"] for m in json.loads(line)["messages"]) for line in [*held, *train]]
    assert sorted(again) == sorted(shown), "the two parts are the training rows, and no evaluation row is among them"
    assert not (fields["output"] / "lr" / "lora" / "train").exists()


def test_a_shared_base_changes_how_runs_come_about_and_not_what_comes_out(
    fields: dict[str, Any], inline: Callable[..., Any]
) -> None:
    inline()
    search = {"rates": 2, "fractions": [0.5], "extend": 0}
    given = {**fields, "methods": [LORA, "ia3"], "lr": "auto", "search": search, "seeds": 2}
    auto, never = (
        compare(CompareConfig(**{**given, "together": how, "output": fields["output"] / how}))
        for how in ("auto", "never")
    )
    assert [(s.label, s.rank) for s in auto.standings] == [(s.label, s.rank) for s in never.standings]
    assert [s.chosen for s in auto.searches] == [s.chosen for s in never.searches]
    for here, there in zip(auto.runs, never.runs, strict=True):
        assert here.together == (2 if here.seed else 1)
        assert there.together == 1
        assert here.best is not None
        assert there.best is not None
        assert here.best.losses == pytest.approx(there.best.losses, rel=1e-4)
        assert [loss for _, loss in here.train_curve] == pytest.approx(
            [loss for _, loss in there.train_curve], rel=1e-4
        )
    for shared, apart in zip(auto.searches, never.searches, strict=True):
        trials = [(trial.together, trial.loss) for trial in shared.rounds[0]]
        assert [count for count, _ in trials] == [2, 2]
        assert {trial.together for trial in apart.rounds[0]} == {1}
        assert [loss for _, loss in trials] == pytest.approx([trial.loss for trial in apart.rounds[0]], rel=1e-4)


@pytest.mark.parametrize(("budget", "steps"), [({"tokens": 300}, None), ({"minutes": 1e-4}, None)])
def test_other_budgets_become_steps(
    fields: dict[str, Any], inline: Callable[..., Any], budget: dict[str, Any], steps: None
) -> None:
    inline()
    result = compare(CompareConfig(**{**fields, "budget": budget}))
    run = result.runs_of("lora")[0]
    if "tokens" in budget:
        per_step = run.tokens / run.steps
        assert abs(run.tokens - 300) <= per_step
    else:
        probe = json.loads((fields["output"] / "probe" / "lora" / "result.json").read_text())
        assert run.steps == max(1, int(60 * 1e-4 / probe["step_seconds"]))


def test_free_text_is_judged_by_its_loss(fields: dict[str, Any], inline: Callable[..., Any]) -> None:
    inline()
    data = {**fields["data"], "scorer": "none"}
    result = compare(CompareConfig(**{**fields, "data": data, "methods": [LORA, "ia3"]}))
    assert result.judge == "loss"
    values = [s.value for s in result.standings]
    assert values == sorted(values)
    assert result.runs_of("lora")[0].best.score is None


def test_the_report_can_be_written(made: Any, tmp_path: Path) -> None:
    from adapterlab.compare.report import write

    files = write(made[0], tmp_path / "report")
    assert "first" in files[0].read_text(encoding="utf-8")
    table = next(file for file in files if file.suffix == ".csv")
    assert list(csv.reader(table.open(encoding="utf-8")))


def test_a_run_with_several_gpus_uses_all_of_them(
    tiny_base: Path, tmp_path: Path, inline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here all that there is to place it over is the CPU."""
    fields = {**small_comparison(tiny_base, tmp_path), "device": "cuda", "gpus": 2}
    (contender,) = (config := CompareConfig(**fields)).contenders()
    places = {"steps": 1, "seed": 0, "lr": 1e-3, "output": tmp_path / "run"}
    assert {key: config.train_fields(contender, **places)[key] for key in ("device", "parallel")} == {
        "device": None, "parallel": "device_map",
    }  # fmt: skip
    inline()
    asked = []
    real = worker.load_model
    monkeypatch.setattr(
        worker, "load_model", lambda *args, **given: asked.append(given["device"]) or real(*args, **given)
    )
    spread = compare(config)
    assert set(asked) == {"auto"}
    plain = compare(CompareConfig(**{**fields, "device": "cpu", "output": tmp_path / "plain"}))
    (one,), (other,) = spread.runs_of("lora"), plain.runs_of("lora")
    assert one.best.losses == pytest.approx(other.best.losses, rel=1e-5)
    assert set(asked) == {"auto", "cpu"}


def test_a_packed_base_has_as_many_parameters_as_it_was_packed_from(
    fields: dict[str, Any], inline: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    inline()
    wide = {"hidden_size": 64, "intermediate_size": 128}  # rows of whole blocks
    base = str(write_model(tmp_path / "wide", **wide))
    given = {**fields, "model": base, "methods": [{"lora": {"r": 2}}], "seeds": 1}
    plain, packed = (
        compare(CompareConfig(**{**given, "quantize": quantize, "output": tmp_path / str(quantize)}))
        for quantize in (None, "nf4")
    )
    assert packed.model["quantize"] == "nf4"
    assert packed.model["parameters"] == plain.model["parameters"] > 0
