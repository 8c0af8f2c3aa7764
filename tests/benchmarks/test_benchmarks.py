"""What the benchmarks make of their runs: pairing, continuing, refusing what is no comparison, counting products."""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import _bench as bench
import pytest
import torch
from scipy.stats import linregress
from torch.utils.flop_counter import FlopCounterMode

from adapterlab.ops.operator import operator

floor, gpu_check, scaling, step_time, vs_trl = map(
    importlib.import_module, ("floor", "gpu_check", "scaling", "step_time", "vs_trl")
)
NOW = {"code": "c", "versions": {"torch": "2"}, "cpu": {"model": "x"}}


def job(pair: int, side: str = "a", **settings: Any) -> Any:
    return bench.Job("case", side, pair, settings)


def test_ratios_are_of_runs_of_one_pair() -> None:
    figures = {"a": [2.0, 9.0, 3.0, 5.0], "b": [1.0, 3.0, 4.0]}  # pair 3 has no partner
    done = [(job(pair, side), {"t": value}) for side, values in figures.items() for pair, value in enumerate(values)]
    done[5] = (done[5][0], {"error": "failed"})  # nor has pair 1
    found = bench.ratios(reversed(done), ("case", "a"), ("case", "b"), lambda run: run["t"])
    assert found == {"median": statistics.median([2.0, 0.75]), "low": 0.75, "high": 2.0, "n": 2}
    assert bench.ratios(done, ("case", "a"), ("other", "b"), lambda run: run["t"]) is None


def test_a_spread_is_shown_with_its_range_where_it_has_one() -> None:
    assert bench.shown(bench.spread([0.5, 0.25, 1.0])) == "0.50 (0.25–1.00)"
    assert bench.shown(bench.spread([0.5])) == "0.50"
    assert bench.shown(None) == "–"


def measure(file: Path, jobs: list[Any], call: Any, *, tolerant: bool = False, **now: Any) -> Any:
    runs = bench.Runs(file, {**NOW, **now}, keep=True)
    bench._measure(__file__, runs, jobs, call, lambda done: None, tolerant)
    return runs


def test_an_interrupted_benchmark_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    jobs, calls = [job(pair, n=pair) for pair in range(4)], []

    def call(settings: Any) -> dict[str, Any]:
        calls.append(settings["n"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"t": settings["n"]}

    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "r.json", jobs, call)
    measure(tmp_path / "r.json", jobs, call)
    assert calls == [0, 1, 2, 2, 3]
    stored = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert [run["figures"]["t"] for run in stored.values()] == [0, 1, 2, 3]


def test_only_runs_of_the_same_job_code_and_versions_count(tmp_path: Path) -> None:
    jobs = [job(0, n=1)]
    measure(tmp_path / "r.json", jobs, lambda settings: {"t": 1})
    again = {name: bench.Runs(tmp_path / "r.json", {**NOW, **now}) for name, now in CHANGES.items()}
    assert {name: len(runs.missing(jobs)) for name, runs in again.items()} == {"same": 0, "code": 1, "versions": 1}
    assert bench.Runs(tmp_path / "r.json", {**NOW, "code": "d"}, keep=True).missing(jobs) == []
    assert again["same"].missing([job(0, n=2)]) == [job(0, n=2)]


CHANGES: dict[str, dict[str, Any]] = {"same": {}, "code": {"code": "d"}, "versions": {"versions": {"torch": "3"}}}


def test_a_failing_run_is_named_or_noted(tmp_path: Path) -> None:
    def call(settings: Any) -> dict[str, Any]:
        if settings["n"] == 0:
            raise RuntimeError("exit code 1")
        return {"t": 1}

    jobs = [job(0, n=0), job(1, n=1)]
    with pytest.raises(SystemExit, match=r"case \| a \| 0: exit code 1"):
        measure(tmp_path / "r.json", jobs, call)
    runs = measure(tmp_path / "r.json", jobs, call, tolerant=True)
    assert [figures for _, figures in runs.figures(jobs)] == [{"error": "exit code 1"}, {"t": 1}]


def test_a_run_beyond_its_limit_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(60)\n")
    args = argparse.Namespace(gpu=False, threads=None, python=sys.executable)
    with pytest.raises(RuntimeError, match=r"limit of 0\.2 seconds"):
        bench.caller(str(tmp_path / "sleeper.py"), args)({"limit": 0.2})


def test_changed_sources_stop_a_benchmark(tmp_path: Path) -> None:
    runs = bench.Runs(tmp_path / "r.json", NOW)
    with pytest.raises(SystemExit, match="changed since this benchmark began"):
        bench._measure(__file__, runs, [job(0)], lambda settings: {}, lambda done: None, False)


def test_tables_go_between_their_markers(tmp_path: Path) -> None:
    (tmp_path / "speed.md").write_text("| new |\n")
    begin, end = "<!-- benchmark speed: begin (generated) -->", "<!-- benchmark speed: end -->"
    filled = bench.fill(f"before\n{begin}\nold\n{end}\nafter\n", tmp_path)
    assert filled == f"before\n{begin}\n| new |\n{end}\nafter\n"
    assert bench.fill(filled, tmp_path) == filled
    with pytest.raises(SystemExit, match="speed: end"):
        bench.fill(begin, tmp_path)
    with pytest.raises(SystemExit, match=r"python benchmarks/other\.py"):
        bench.fill(begin.replace("speed", "other") + end.replace("speed", "other"), tmp_path)


def pair(**changed: Any) -> list[Any]:
    same = {
        "rows": [[0]], "tokens": 9, "tokens_seen": 9, "labels": 4, "trainable": 8, "adapter_dtype": ["torch.float32"],
        "mean_loss": 1.0,
    }  # fmt: skip
    return [(job(3, "adapterlab"), same), (job(3, "TRL"), {**same, **changed})]


def test_other_losses_or_other_rows_are_no_comparison() -> None:
    vs_trl.check(pair(mean_loss=1.009))
    for changed, shown in (
        ({"mean_loss": 1.011}, r"Pair 3.*1\.0000.*1\.0110.*1\.1%"),
        ({"mean_loss": float("nan")}, "nan"),
        ({"labels": 5}, "labels of adapterlab and TRL"),
        ({"rows": [[1]]}, "rows of adapterlab and TRL"),
        ({"tokens_seen": 8}, "TRL trained on 8 tokens; the rows have 9"),
    ):
        with pytest.raises(SystemExit, match=shown):
            vs_trl.check(pair(**changed))


def test_line_is_the_least_squares_line() -> None:
    x, y = [1.0, 2.0, 4.0, 8.0], [3.0, 4.5, 9.5, 16.0]
    found, wanted = scaling.line(x, y), linregress(x, y)
    assert found == pytest.approx({"slope": wanted.slope, "intercept": wanted.intercept, "r2": wanted.rvalue**2})


def test_sweep_over_tokens_keeps_to_its_limit() -> None:
    shapes = [point["shape"] for point in scaling.points("tokens", 2048, False)]
    assert {rows * length for rows, length in shapes} == {256, 512, 1024, 2048}
    assert {length for _, length in shapes} == set(scaling.LENGTHS)


@pytest.mark.parametrize("text", ["2", "2x", "axb", "2x3x4", ""])
def test_shapes_that_cannot_be_read(text: str) -> None:
    with pytest.raises(SystemExit, match="2x256,4x512"):
        step_time._shapes(text)


@operator("_benchmark_product(Tensor a, Tensor b) -> Tensor", lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
def fused(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.zeros(a.shape[0], b.shape[1]).addmm_(a, b) + 1


def test_products_of_fused_operators_and_backward_passes_are_counted() -> None:
    a, b = torch.randn(6, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    batches = torch.randn(2, 6, 5), torch.randn(2, 5, 3)

    def compute() -> None:
        (a @ b).sum().backward()
        torch.bmm(*batches)
        fused(a.detach(), b.detach())

    calls = floor.products(compute)
    assert sorted(call["name"] for call in calls) == ["addmm", "bmm", "mm", "mm", "mm"]
    transposed = [operand for call in calls for operand in call["operands"] if operand[1][0] == 1]
    assert transposed, "the operands of the backward pass are views"
    replay, operations = floor.prepared(calls)
    replay()
    with FlopCounterMode(display=False) as counter:
        (a @ b).sum().backward()
        torch.bmm(*batches)
        a.detach() @ b.detach()
    assert operations == counter.get_total_flops()


def test_the_gpu_check_needs_ten_minutes_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    args = argparse.Namespace(quick=False, pairs=1, steps=1)
    monkeypatch.setattr(gpu_check, "_card", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_check.plan(args)
    monkeypatch.setattr(gpu_check, "_card", lambda: True)
    jobs = gpu_check.plan(args)
    assert sum(job.settings["limit"] for job in jobs) <= 600
    assert {job.settings["part"] for job in jobs} == gpu_check.PARTS.keys()


def test_forms_of_products_of_many_adapters_agree() -> None:
    """The form with a mask of blocks and the one with a product for each row; the third is not on every device."""
    found = gpu_check.grouped({"model": bench.TINY, "device": "cpu", "steps": 1})
    assert {form[name]["error"] < 1e-2 for form in found.values() for name in ("each", "masked")} == {True}
    found = gpu_check.runs({"model": bench.TINY, "device": "cpu", "steps": 1})
    assert {form["stacks"]["error"] < 1e-2 for form in found.values()} == {True}


def test_what_failed_in_the_gpu_check_leaves_the_rest() -> None:
    settings = {"part": "step", "lengths": [[2, 8]], "method": "lora"}
    sides = {side: {**settings, "side": side} for side in (gpu_check.OURS, gpu_check.THEIRS)}
    jobs = [bench.Job("step", f"lora, {side}", 0, own) for side, own in sides.items()]
    figures = {"2x8": {"step": 2.0, "live": 90, "process": 200}}
    planned = bench.Job("plan", gpu_check.OURS, 0, {}), {"lora": {"2x8": {"live": 99, "process": 100}}}
    done = [(jobs[0], figures), (jobs[1], {"error": "no TRL"}), planned]
    summary, table = gpu_check.report(done, Path("x.json"))
    assert summary["step"]["lora"]["2x8"]["error of live tensors"] == pytest.approx(0.1)
    assert summary["step"]["lora"]["2x8"]["error of all memory"] == pytest.approx(-0.5)
    assert summary["failed"] == {jobs[1].key: "no TRL"}
    assert "| +10.0% | -50.0% |" in table
    done[1] = (jobs[1], {"2x8": {"step": 4.0, "live": 180, "process": 400}})
    assert "| 0.50 | 0.50 | +10.0%" in gpu_check.report(done, Path("x.json"))[1]


@pytest.mark.parametrize("id", ["lora", "ia3", "prompt_tuning"])
def test_peft_gets_the_same_adapter(id: str) -> None:
    settings = {"model": bench.TINY, "rank": 4, "steps": 1, "shapes": [[1, 8]], "method": id}
    config = step_time._config(settings, id)
    assert config is not None
    ours = step_time._measured(settings, step_time._ours)
    theirs = step_time._measured({**settings, "config": json.loads(json.dumps(config))}, step_time._peft)
    assert ours["trainable"] == theirs["trainable"]
    assert ours["shapes"]["1x8"]["step"] > 0
