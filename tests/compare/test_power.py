"""How many rows and seeds a difference needs: against textbooks, simulated comparisons, and a pilot of known spread."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fabricate import fabricate

from adapterlab.cli import main
from adapterlab.compare import outlook, statistics
from adapterlab.compare.config import CompareConfig
from adapterlab.compare.power import (
    Spread,
    cheapest,
    least_difference,
    needs,
    of_discordance,
    rows_needed,
    spread_of,
    with_more_seeds,
)
from adapterlab.compare.recommending import recommend
from adapterlab.compare.results import Comparison
from adapterlab.compare.statistics import Sheets, differences
from adapterlab.compare.summary import summarise
from adapterlab.errors import ConfigError

SPREAD = Spread(0.02, 0.1, 0.25, "made up")


def found(spread: Spread, difference: float, seeds: int, rows: int, times: int = 80) -> float:
    """Share of comparisons that call two methods different which are."""
    draw, hits, names = np.random.default_rng(seeds), 0, tuple(range(seeds))
    for time in range(times):
        parts = ((spread.seeds or 0, (seeds, 1)), (spread.rows, (1, rows)), (spread.rest, (seeds, rows)))
        a = draw.normal(1, 0.3, (1, rows)) + np.zeros((seeds, rows))
        b = a + difference + sum(draw.normal(0, sd, shape) for sd, shape in parts)
        sheets = Sheets({"a": a, "b": b}, {"a": names, "b": names}, np.ones(rows))
        hits += differences(sheets, 0.05, seed=time)[0].distinct
    return hits / times


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_simulated_comparisons_find_the_difference_as_often_as_promised(
    seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_LEAST", 1000)  # resamples: fewer are enough to see 5 %
    spread = SPREAD if seeds > 1 else Spread(None, 0.1, 0.25, "")  # one seed is one set of weights
    rows = rows_needed(spread, 0.06, seeds, level=0.05)
    assert rows is not None
    assert 0.7 <= found(spread, 0.06, seeds, rows) <= 0.95
    assert found(spread, 0.06, seeds, rows // 4, times=40) < 0.6


def test_one_seed_of_right_and_wrong_is_mcnemars_number_of_pairs() -> None:
    # Connor 1987: (z_a √ψ + z_b √(ψ − D²))² / D² gives 468 for D = 0.05, ψ = 0.15; its first root is that of the null
    spread = of_discordance(0.15, 0.05)
    assert rows_needed(spread, 0.05, 1, level=0.05) == pytest.approx(468, rel=0.02)
    assert rows_needed(spread, 0.05, 5, level=0.05) == rows_needed(spread, 0.05, 1, level=0.05)  # the careful side


def test_seeds_that_spread_too_far_need_more_seeds_and_no_number_of_rows() -> None:
    loud = Spread(0.05, 0.1, 0.3, "")
    made = needs(loud, 0.05, seeds=(2, 5, 10, 40), rows=100)
    assert [need.rows is None for need in made] == [True, True, False, False]
    assert (cheapest(made) or made[0]).seeds == 10
    assert cheapest(made[:2]) is None
    assert made[0].least is not None
    assert made[-1].least is not None
    assert made[0].least > made[-1].least


def test_the_smallest_difference_is_the_one_that_needs_these_rows() -> None:
    least = least_difference(SPREAD, 3, 150, level=0.01)
    assert rows_needed(SPREAD, least, 3, level=0.01) == pytest.approx(150, abs=1)
    many = needs(SPREAD, 0.1, pairs=45)[0].rows
    one = needs(SPREAD, 0.1)[0].rows
    assert many is not None
    assert one is not None
    assert many > one


def pilot(seeds: int, judge: str = "loss", rows: int = 400) -> Comparison:
    """A comparison whose differences have the spread above, of rows of different length."""
    draw = np.random.default_rng(5)
    made = fabricate(methods=("dora", "ia3"), seeds=seeds, rows=rows, failed=False, judge=judge)
    runs = []
    for run in made.runs:
        assert run.best is not None
        tokens = np.array(run.best.tokens)
        losses = 2.0 * tokens
        if run.method == "ia3":
            steady = np.random.default_rng(6).normal(0, SPREAD.rows, rows)
            noise = draw.normal(0, SPREAD.seeds or 0) + steady + draw.normal(0, SPREAD.rest, rows)
            losses = losses + 0.3 * tokens + noise * tokens.mean()
        runs.append(run.model_copy(update={"best": run.best.model_copy(update={"losses": list(losses)})}))
    facts = {key: getattr(made, key) for key in ("name", "started", "updated", "finished", "config", "data")}
    return summarise(runs, judge=judge, level=0.05, **facts)  # type: ignore[arg-type]


def test_a_pilot_says_how_far_rows_and_seeds_spread() -> None:
    spread = spread_of(pilot(30))
    assert spread is not None
    assert spread.seeds is not None
    assert (spread.rows, spread.rest) == pytest.approx((SPREAD.rows, SPREAD.rest), rel=0.15)
    assert spread.seeds == pytest.approx(0.02, rel=0.5)
    alone = spread_of(pilot(1))
    assert alone is not None
    assert alone.seeds is None
    assert alone.rows == pytest.approx((SPREAD.rows**2 + SPREAD.rest**2) ** 0.5, rel=0.15)
    assert spread_of(fabricate(methods=("dora",), failed=False)) is None


def test_what_cannot_be_told_is_said_with_what_it_would_take() -> None:
    made = pilot(3)
    assert made.recommendation is not None
    assert "would" not in made.recommendation.text
    close = fabricate(methods=("lora r=8", "lora r=16"), failed=False, seeds=3)
    facts = {key: getattr(close, key) for key in ("name", "started", "updated", "finished", "config", "data")}
    text = summarise(close.runs, judge="score", level=0.05, **facts).recommendation
    assert text is not None
    assert "To tell 5 points apart here takes about " in text.text
    assert "evaluation rows and" in text.text
    assert "seeds of each method." in text.text


def test_more_seeds_than_usual_are_a_number_too() -> None:
    loud, pairs = Spread(0.1, 0.12, 0.35, ""), 6
    assert cheapest(needs(loud, 0.05, pairs=pairs)) is None
    need = with_more_seeds(loud, 0.05, pairs=pairs)
    near = [rows_needed(loud, 0.05, seeds, level=0.05 / pairs) for seeds in (need.seeds - 1, need.seeds)]
    assert need.rows == near[1] is not None
    assert need.rows <= 1000
    assert near[0] is None or near[0] > 1000, "one seed less asks for more rows"
    wide = with_more_seeds(Spread(0.1, 2.0, 0.35, ""), 0.05, pairs=pairs)  # 1,000 rows are too few for any seeds
    assert wide.rows is not None
    assert wide.rows > 1000


def changed(made: Comparison, **facts: object) -> str:
    """The recommendation of a comparison with other runs."""
    kept = {key: getattr(made, key) for key in ("name", "started", "updated", "finished", "config", "data")}
    text = summarise(judge=made.judge, level=made.level, **{**kept, "runs": made.runs, **facts}).recommendation  # type: ignore[arg-type]
    assert text is not None
    return text.text


def test_advice_has_numbers_however_far_seeds_spread_and_says_why_where_there_are_none() -> None:
    made = fabricate(methods=("lora r=8", "lora r=16"), failed=False, seeds=2, judge="loss", rows=60)
    factors = {("lora r=8", 0): 1.25, ("lora r=8", 1): 1.6, ("lora r=16", 0): 1.4, ("lora r=16", 1): 1.1}
    runs = []
    for run in made.runs:
        assert run.best is not None
        losses = [loss * factors.get((run.label, run.seed), 3.0) for loss in run.best.losses]
        runs.append(run.model_copy(update={"best": run.best.model_copy(update={"losses": losses})}))
    spread = spread_of(made.model_copy(update={"runs": runs}))
    assert spread is not None
    assert cheapest(needs(spread, 0.05, pairs=3)) is None, "twenty seeds are not enough"
    text = changed(made, runs=runs)
    need = with_more_seeds(spread, 0.05, pairs=3)
    assert f"takes about {need.rows:,} evaluation rows and {need.seeds} seeds of each method." in text
    first = [run for run in runs if run.seed == 0]
    one = changed(made, runs=first)
    assert "takes at least " in one
    assert "How many seeds of each method it takes cannot be said from one." in one
    apart = changed(made, runs=[run for run in first if run.label != "lora r=8"] + [
        run for run in runs if (run.label, run.seed) == ("lora r=8", 1)])  # fmt: skip
    assert "none of them has finished a seed that" in apart
    short = {"losses": [1.0], "tokens": [2], "right": [1]}
    of_one_row = [run.model_copy(update={"best": run.best and run.best.model_copy(update=short)}) for run in made.runs]
    assert "one evaluation row says nothing of how far rows spread" in changed(made, runs=of_one_row)


def test_costs_that_nobody_measured_are_not_told() -> None:
    made = fabricate(methods=("dora", "ia3"), failed=False)
    assert " GiB at its peak, " in recommend(made).text
    bare = {"memory": None, "train_seconds": None, "inference": None, "step_flops": None, "flops": None}
    text = recommend(made.model_copy(update={"runs": [run.model_copy(update=bare) for run in made.runs]})).text
    assert not any(word in text for word in ("GiB", "of training", "least memory", "least time"))


def ask(*arguments: str) -> int:
    """The exit status of `compare --power`."""
    with pytest.raises(SystemExit) as ended:
        main(["compare", *arguments])
    return int(str(ended.value.code))


def test_the_command_asks_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pilot(3).save(tmp_path)
    assert ask("--power", "--pilot", str(tmp_path), "--nats", "0.1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["judge"], told["difference"], told["methods"], told["pairs"], told["rows"]) == ("loss", 0.1, 2, 3, 400)
    assert [need["seeds"] for need in told["needs"]] == [2, 3, 5, 10, 20]
    assert ask("--power", "--discordance", "0.2") == 0
    text = capsys.readouterr().out
    assert "To tell 5 points apart" in text
    assert max(map(len, text.splitlines())) <= 80
    assert ask("--pilot", str(tmp_path)) == 2
    assert "belongs to --power" in capsys.readouterr().err


def test_what_is_asked_wrongly_is_refused() -> None:
    config = CompareConfig(data={"task": "chain_sum"}, methods=["lora", "dora", "ia3"], budget={"steps": 1})
    assert (outlook(config).methods, outlook(config).pairs) == (3, 6)
    for wrong in (
        {"points": 5.0, "nats": 0.1},
        {"nats": -1.0},
        {"points": 5.0, "pilot": pilot(2)},
        {"discordance": 0.01},
        {"discordance": 0.2, "nats": 0.1},
        {"pilot": fabricate(methods=("dora",), failed=False)},
    ):
        with pytest.raises(ConfigError):
            outlook(config, **wrong)  # type: ignore[arg-type]
