import io

import pytest
from fabricate import fabricate
from rich.console import Console

from adapterlab.compare.engine import Active
from adapterlab.compare.report.live import LiveView, remaining


def shown(view):
    return view.console.file.getvalue()


def at_work(step=10, total=40, elapsed=20.0):
    return Active(name="vera, seed 0", label="vera", kind="run", seed=0, phase="training", step=step, total=total,
                  loss=1.25, elapsed=elapsed)  # fmt: skip


def view(height=60, times=(100.0, 160.0)):
    clock = iter(times)
    console = Console(file=io.StringIO(), force_terminal=True, width=140, height=height, color_system=None)
    return LiveView(console, clock=lambda: next(clock))


def test_every_run_is_shown_with_its_state_and_the_time_left():
    made, live = fabricate(running=True), view()
    with live:
        live.update(made, [at_work()])
    text = shown(live)
    line = next(line for line in text.splitlines() if "vera" in line and "training" in line)
    for part in ("1.2500", "20.0 s", "1 min 00 s"):  # 10 of 40 steps took 20 s, so 60 s are left
        assert part in line
    assert "failed: NotTrainingError: 120 of 120" in text
    assert "waiting" in text
    assert f"15 of {len(made.runs)} runs ended, 1 min 00 s spent, about" in text


def test_searches_are_shown_too():
    made, live = fabricate(running=True), view()
    job = Active(name="vera, learning rate", label="vera", kind="search", seed=0, phase="training", step=3, total=9)
    with live:
        live.update(made, [job])
    assert any("vera, learning rate" in line for line in shown(live).splitlines())


def test_on_a_small_screen_what_runs_and_what_failed_comes_first():
    live = view(height=12)
    with live:
        live.update(fabricate(running=True), [at_work()])
    text = shown(live)
    assert "training" in text
    assert "failed" in text
    assert "prefix_tuning" not in text


def test_time_left_for_all_runs():
    runs = [run for run in fabricate(running=True).runs if run.label in ("dora", "vera")]
    runs[1] = runs[1].model_copy(update={"status": "waiting", "wall_seconds": None})  # the second seed of dora
    assert remaining(runs, {}) == pytest.approx(3 * runs[0].wall_seconds)
    # Had it been one of five in a process, the others would have had their part of that time.
    shared = [runs[0].model_copy(update={"together": 5}), *runs[1:]]
    assert remaining(shared, {}) == pytest.approx(3 * runs[0].wall_seconds / 5)
    # vera runs: 60 s to go, 80 s in all, which is what its second seed will take.
    active = {("vera", 0): at_work()}
    assert remaining(runs, active) == pytest.approx(60 + 80 + runs[0].wall_seconds)
    assert remaining(runs, active, processes=2) == pytest.approx((60 + 80 + runs[0].wall_seconds) / 2)
    assert remaining(runs[:1], {}) == 0
    assert remaining(runs[2:], {}) is None
