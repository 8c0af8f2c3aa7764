"""What runs when, what is tried again, and what is given up, with workers that only pretend."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapterlab.compare import CompareConfig, compare, engine, pools
from adapterlab.compare.halving import halve, spread
from adapterlab.compare.jobs import Job, JobFolder
from adapterlab.compare.results import UNTRAINED, Exam, Run, Trial
from adapterlab.compare.sharing import Shared, dealt, shared
from adapterlab.plan import before_run


def pretend(folder: Path) -> int:
    """Finish a job with figures that depend on the method's label alone."""
    place = JobFolder(folder)
    job = place.job()
    if job.kind == "search":
        trial = {"lr": 1e-3, "steps": job.steps, "loss": 1.0, "kept": True}
        place.finish({"label": job.label, "auto": True, "chosen": 1e-3, "rounds": [[trial]]})
        return 0
    if job.kind == "together":
        for member in job.members:
            Shared(runs=len(job.members)).write(JobFolder(member.folder(folder.parents[1])))
        place.finish({"runs": len(job.members)})
        return 0
    good = 0 if job.kind == "untrained" else 6
    exam = Exam(loss=1.0, losses=[1.0] * 8, tokens=[1] * 8, score=good / 8, right=[1] * good + [0] * (8 - good))
    key = job.contender.key if job.contender else UNTRAINED
    method = job.contender.method if job.contender else UNTRAINED
    run = Run(label=job.label, key=key, method=method, seed=job.seed, status="finished", best=exam, final=exam)
    plain = run.model_dump(mode="json")
    place.finish({"run": plain, "tokens_per_row": 5.0} if job.kind == "untrained" else plain)
    return 0


APART = ["untrained", "lr/lora", "runs/lora/seed0", "runs/lora/seed1", "lr/ia3", "runs/ia3/seed0", "runs/ia3/seed1"]
SHARED = [
    "untrained", "lr/lora", "runs/lora/seed0", "lr/ia3", "runs/ia3/seed0", "together/lora-seed1",
    "runs/lora/seed1", "runs/ia3/seed1",
]  # fmt: skip


def started(pool: Any, root: Path) -> list[str]:
    return [str(folder.relative_to(root)) for folder in pool.started]


@pytest.mark.parametrize(("together", "names"), [("never", APART), ("auto", SHARED)])
def test_order_and_dependencies(
    together: str, names: list[str], fields: dict[str, Any], inline: Callable[..., Any]
) -> None:
    """Runs share a base once all rates are known, but for those of the first seed, which say what each costs."""
    pool = inline(pretend)
    config = {**fields, "methods": ["lora", "ia3"], "lr": "auto", "seeds": 2, "together": together}
    compare(CompareConfig(**config))
    assert started(pool, fields["output"]) == names


def test_runs_whose_common_process_failed_go_on_by_themselves(
    fields: dict[str, Any], inline: Callable[..., Any]
) -> None:
    pool = inline(lambda folder: -9 if "together" in folder.parts else pretend(folder))
    config = CompareConfig(**{**fields, "methods": ["lora", "ia3"], "seeds": 2})
    assert {run.status for run in compare(config).runs} == {"finished"}
    assert started(pool, fields["output"])[-3:] == ["together/lora-seed1", "runs/lora/seed1", "runs/ia3/seed1"]
    mark = shared(JobFolder(fields["output"] / "runs/ia3/seed1"))
    assert mark is not None
    assert mark.runs == 1
    assert "2 runs together failed" in mark.reason


def test_a_single_run_that_could_share_has_a_process_of_its_own(
    fields: dict[str, Any], inline: Callable[..., Any]
) -> None:
    pool = inline(pretend)
    compare(CompareConfig(**{**fields, "seeds": 2}))
    assert started(pool, fields["output"]) == ["untrained", "runs/lora/seed0", "runs/lora/seed1"]


@pytest.mark.parametrize(
    ("count", "places", "sizes"), [(0, 4, []), (1, 4, []), (3, 4, [3]), (5, 2, [3, 2]), (8, 3, [3, 3, 2]), (8, 1, [8])]
)
def test_runs_are_dealt_out_evenly(count: int, places: int, sizes: list[int]) -> None:
    jobs = [Job(kind="run", seed=seed) for seed in range(count)]
    groups = dealt(jobs, places)
    assert [len(group) for group in groups] == sizes
    assert sorted(job.seed for group in groups for job in group) == (list(range(count)) if count > 1 else [])
    assert all(b.seed - a.seed == len(groups) for group in groups for a, b in itertools.pairwise(group))


@pytest.mark.parametrize("crash", [True, False])
def test_failures_are_tried_once_more(fields: dict[str, Any], inline: Callable[..., Any], crash: bool) -> None:
    tries: list[Path] = []

    def work(folder: Path) -> int:
        if "ia3" not in folder.parts:
            return pretend(folder)
        tries.append(folder)
        if not crash:
            JobFolder(folder).fail("RuntimeError: odd", final=False)
        return -9 if crash else 1

    inline(work)
    config = CompareConfig(**{**fields, "methods": ["lora", "ia3"]})
    result = compare(config)
    assert len(tries) == 2
    (failed,) = result.runs_of("ia3", "failed")
    assert failed.attempts == 2
    assert ("signal 9" if crash else "odd") in failed.reason
    assert len(result.runs_of("lora")) == 1
    compare(config)
    assert len(tries) == 2, "what was given up stays so"
    compare(config, retry=True)
    assert len(tries) == 4


def test_a_failure_that_cannot_go_away_is_not_tried_again(fields: dict[str, Any], inline: Callable[..., Any]) -> None:
    tries: list[Path] = []

    def work(folder: Path) -> int:
        if folder.name != "seed1":
            return pretend(folder)
        tries.append(folder)
        JobFolder(folder).fail("NotTrainingError: nothing moved", final=True)
        return 1

    inline(work)
    result = compare(CompareConfig(**{**fields, "seeds": 2}))
    assert len(tries) == 1
    standing = next(s for s in result.standings if s.label == "lora")
    assert (standing.finished, standing.failed) == (1, 1)
    assert "nothing moved" in standing.reason


def test_what_cannot_fit_is_refused_before_it_loads_and_the_others_go_on(
    fields: dict[str, Any], inline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:

    def room(place: Any) -> int:
        return 1000 if JobFolder(pool.started[-1]).job().label == "full" else 2**40

    monkeypatch.setattr(before_run, "_TRIFLE", 0.0)
    monkeypatch.setattr(before_run, "_available", room)
    pool = inline()
    result = compare(CompareConfig(**{**fields, "methods": ["lora", "full"]}))
    (failed,) = result.runs_of("full", "failed")
    assert failed.attempts == 1
    assert "cannot fit" in failed.reason
    assert not (pool.started[-1] / "train").exists()
    assert len(result.runs_of("lora")) == 1


def test_no_process_starts_on_memory_that_running_ones_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "command", lambda folder: [sys.executable, "-c", "import time; time.sleep(100)"])
    pool = pools.LocalPool(3, 1)
    pool.need = 10 * 2**30
    free = SimpleNamespace(available=2**30)
    monkeypatch.setattr(pools.psutil, "virtual_memory", lambda: free)
    try:
        assert pool.has_room(), "one may always run"
        pool.start(tmp_path / "one")
        free.available = 18 * 2**30
        assert not pool.has_room(), "10 are promised to the first, which has next to nothing yet"
        free.available = 21 * 2**30
        assert pool.has_room()
        pool.start(tmp_path / "two")
        assert not pool.has_room()
    finally:
        for process in pool.running.values():
            process.kill()
        pool.stop()


def test_a_search_without_a_rate_fails_its_runs_with_the_reason(
    fields: dict[str, Any], inline: Callable[..., Any]
) -> None:
    def work(folder: Path) -> int:
        job = JobFolder(folder).job()
        if job.kind != "search":
            return pretend(folder)
        trial = {"lr": 1.0, "steps": 1, "reason": "TrainingError: the loss is nan"}
        JobFolder(folder).finish({"label": job.label, "auto": True, "chosen": None, "rounds": [[trial]]})
        return 0

    pool = inline(work)
    result = compare(CompareConfig(**{**fields, "lr": "auto"}))
    assert not any("runs" in folder.parts for folder in pool.started)
    assert "the loss is nan" in result.runs_of("lora", "failed")[0].reason


def test_the_same_folder_is_not_worked_on_twice(fields: dict[str, Any], inline: Callable[..., Any]) -> None:
    from adapterlab.errors import OutputError

    config = CompareConfig(**fields)
    second: list[str] = []

    def work(folder: Path) -> int:
        if not second:
            with pytest.raises(OutputError, match="Another process") as caught:
                compare(config)
            second.append(str(caught.value))
        return pretend(folder)

    inline(work)
    compare(config)
    assert second


def test_rates_lie_around_the_centre() -> None:
    assert spread(1e-3, 4, 10) == [1e-4, 1e-3, 1e-2, 1e-1]
    assert spread(1e-3, 3, 10) == [1e-4, 1e-3, 1e-2]
    assert spread(1e-3, 2, 10) == [1e-3, 1e-2]


def losses(best: float) -> Callable[[Sequence[float], int], list[Trial]]:
    """Loss by distance from the best rate; rates above 1 fail."""

    def trial(rate: float, steps: int) -> Trial:
        loss = None if rate > 1 else abs(math.log(rate / best))
        return Trial(lr=rate, steps=steps, loss=loss, reason="" if loss is not None else "nan")

    return lambda rates, steps: [trial(rate, steps) for rate in rates]


@pytest.mark.parametrize(("best", "expected"), [(1e-3, 1e-3), (1e-2, 1e-2), (1e-5, 1e-5), (100.0, 1.0)])
def test_halving_finds_the_best_rate_even_just_beyond_an_end(best: float, expected: float) -> None:
    rates = [1e-1, 1.0, 10.0] if best > 1 else [1e-4, 1e-3, 1e-2]
    rounds = halve(rates, [4, 8], losses(best), extend=1, factor=10)
    assert [t.lr for t in rounds[-1] if t.kept] == [expected]
    assert all(t.steps == 8 for t in rounds[-1])
    assert len(rounds[-1]) == 2


@pytest.mark.parametrize("best", [1e-6, 0.1])
def test_the_range_widens_until_the_best_rate_has_neighbours(best: float) -> None:
    rounds = halve([1e-4, 1e-3, 1e-2] if best < 1e-4 else [1e-5, 1e-4], [4, 8], losses(best), extend=5, factor=10)
    tried = {t.lr for t in rounds[0]}
    assert min(tried) < best < max(tried)
    assert [t.lr for t in rounds[-1] if t.kept] == [best]


def test_the_range_widens_in_a_longer_round_too() -> None:
    """Rates that look good at first can be too high in the end."""

    def trials(rates: Sequence[float], steps: int) -> list[Trial]:
        return losses(1e-3 if steps == 4 else 1e-6)(rates, steps)

    rounds = halve([1e-4, 1e-3, 1e-2], [4, 8], trials, extend=4, factor=10)
    assert [len(trials) for trials in rounds] == [3, 5]
    assert [t.lr for t in rounds[1] if t.kept] == [1e-6]


def test_where_every_rate_fails_lower_ones_are_tried() -> None:
    rounds = halve([200.0, 300.0], [4, 8], losses(1.0), extend=6, factor=10)
    assert [t.lr for t in rounds[-1] if t.kept] == [0.2]
    rounds = halve([200.0, 300.0], [4, 8], losses(1.0), extend=1, factor=10)
    assert len(rounds) == 1
    assert not any(t.kept for t in rounds[0])


def test_progress_is_shown(fields: dict[str, Any], inline: Callable[..., Any]) -> None:
    from adapterlab.compare.watching import Lines

    inline(pretend)
    said: list[str] = []
    compare(CompareConfig(**fields), watcher=Lines(said.append))
    assert any(line.startswith("started: lora") for line in said)
    assert any("lora, seed 0: 75.0% right" in line for line in said)
    state = json.loads((fields["output"] / "comparison.json").read_text())
    assert state["finished"] is True


def test_a_summary_that_takes_long_is_made_seldom(
    fields: dict[str, Any], inline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    summarise, made = engine._Work.compare, []

    def slow(self: Any, **given: Any) -> Any:
        time.sleep(0.2)
        made.append(given.get("finished"))
        return summarise(self, **given)

    monkeypatch.setattr(engine._Work, "compare", slow)
    inline(pretend)
    began = time.monotonic()
    result = compare(CompareConfig(**{**fields, "methods": [{"lora": {"r": [1, 2, 3, 4, 5, 6]}}], "seeds": 2}))
    assert len(result.runs_of("lora r=1")) == 2
    assert result.finished
    assert len(made) <= 3 + (time.monotonic() - began) / 2.0, "and not for each of the runs"
    assert made[-1] is True
