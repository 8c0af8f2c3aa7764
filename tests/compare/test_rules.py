"""The field's rules: their configurations, how verdicts come about, and that `advise` cites what was measured."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fabricate import fabricate

from adapterlab.compare.config import load_config
from adapterlab.compare.results import Comparison

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("rules", ROOT / "scripts" / "rules.py")
assert SPEC is not None
assert SPEC.loader is not None
rules: Any = importlib.util.module_from_spec(SPEC)
sys.modules["rules"] = rules  # dataclasses look their module up
SPEC.loader.exec_module(rules)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of results; what is read from it is forgotten after the test."""
    rules._comparison.cache_clear()
    rules._measured.cache_clear()
    monkeypatch.setattr(rules, "RESULTS", tmp_path)
    return tmp_path


def made_up() -> Comparison:
    made = fabricate(failed=False)
    return made.model_copy(update={"conditions": {**made.conditions, "rows in a step": 8}})


def keep(folder: Path, comparison: Comparison) -> Path:
    folder.mkdir()
    comparison.save(folder)
    return folder


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.title)
def test_every_rule_has_a_configuration_that_says_what_it_tests(rule: Any) -> None:
    file = ROOT / "examples" / "rules" / f"{rule.id}.yaml"
    config = load_config(file)
    assert config.output == Path("comparisons/rules") / rule.id
    assert len(config.seeds) > 1
    text = file.read_text(encoding="utf-8")
    assert "\n# From: " in text
    assert " here if " in " ".join(text.replace("\n#", " ").split())
    said = [prediction.says for prediction in rule.predictions]
    assert len(set(said)) == len(said), "figures are told by what is said"


def test_every_configuration_bears_on_a_rule() -> None:
    there = {file.stem for file in (ROOT / "examples" / "rules").glob("*.yaml")}
    used = {Path(prediction.results).name for rule in rules.RULES for prediction in rule.predictions}
    assert used - {"compare_smollm2", "compare_gsm8k_small"} == there


def test_the_interval_decides() -> None:
    def verdict(low: float, high: float, seeds: int = 2) -> str:
        found = rules.Measured((low + high) / 2, (low, high), seeds)
        return str(rules.Prediction("", ".", lambda _: found, -math.inf, 0.1).verdict())

    assert verdict(-0.3, 0.05) == rules.HOLDS
    assert verdict(0.11, 0.4) == rules.NOT
    assert verdict(0.0, 0.2) == rules.OPEN
    assert verdict(-0.3, 0.05, seeds=1) == verdict(0.2, 0.3, seeds=1) == rules.OPEN
    assert rules.Prediction("", "nowhere", lambda _: None).verdict() == rules.UNMEASURED


def test_a_rule_holds_if_all_that_it_says_does(kept: Path) -> None:
    (kept / "there").mkdir()

    def said(value: float, results: str = "there") -> Any:
        return rules.Prediction("", results, lambda _: rules.Measured(value, (value, value), 2), 0.0, 1.0)

    def verdict(*predictions: Any) -> str:
        return str(rules.Rule("", "", "", predictions, "", "", "").verdict())

    assert verdict(said(0.5), said(0.9)) == rules.HOLDS
    assert verdict(said(0.5), said(2.0)) == rules.NOT
    assert verdict(said(0.5), said(0.5, "missing")) == rules.PARTLY
    assert verdict(said(0.5, "missing")) == rules.UNMEASURED


def test_figures_are_those_of_the_comparison(kept: Path) -> None:
    made = fabricate(failed=False)
    folder = keep(kept / "made", made)
    found = rules.loss("dora", "ia3")(folder)
    losses = {
        label: [run.best.loss for run in made.runs_of(label) if run.best is not None] for label in ("dora", "ia3")
    }
    expected = sum(losses["dora"]) / 2 - sum(losses["ia3"]) / 2
    assert found.value == pytest.approx(expected)
    assert found.interval[0] < expected < found.interval[1]
    assert found.seeds == 2
    assert rules.loss("dora", "nobody")(folder) is None
    best = min(("dora", "bitfit"), key=lambda label: made.mean(label, lambda run: run.best and run.best.loss) or 0)
    assert rules.loss("bitfit | dora", "ia3")(folder) == rules.loss(best, "ia3")(folder)
    forgot = rules.figure("dora", "ia3", lambda run: run.forgetting)(folder)
    assert forgot.value == pytest.approx(0.1 * (0.67 - 0.31))
    searched = keep(kept / "searched", _searched(made))
    ratio = rules.ratio_of_rates("ia3", "dora")(searched)
    assert (ratio.value, *ratio.interval) == pytest.approx((10, 10 / 3, 30))
    assert ratio.seeds == 1, "a search has one, however many runs follow it"
    keep(kept / "searched_seed1", _searched(made))
    assert rules.ratio_of_rates("ia3", "dora")(searched).seeds == 2
    assert rules.share_of_steps("dora", "ia3")(folder).value == pytest.approx(0.4)
    assert rules.share_of_steps("bitfit | dora", "ia3")(folder) == rules.share_of_steps(best, "ia3")(folder)
    assert str(rules.share_of_steps("ia3", "dora")(folder)) == "in no seed"
    twin = keep(kept / "twin", made)
    assert rules.loss("dora", "ia3", beside="made")(twin).value == pytest.approx(expected)


def _searched(made: Comparison) -> Comparison:
    return made.model_copy(update={"config": {**made.config, "search": {"factor": 3.0}, "seeds": [0, 1]}})


def test_where_it_cannot_be_told_the_page_says_what_it_would_take(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_up()
    for name in ("first", "second"):
        keep(kept / name, made)
    found = rules.loss("dora", "ia3")(kept / "first")
    assert re.fullmatch(r"[\d,]+ evaluation rows and \d+ seeds", found.needs)

    def rule(low: float, high: float, results: str = "first") -> Any:
        prediction = rules.Prediction("it is", results, rules.loss("dora", "ia3"), low, high)
        return rules.Rule("none", "A rule", "nowhere", (prediction,), "method.r", "Rank 8.", rules.HOLDS)

    unsure = rule(found.value, math.inf)
    monkeypatch.setattr(rules, "RULES", (unsure, rule(-math.inf, found.interval[0] - 1, "second")))
    text = rules.page()
    assert f"To tell 0.1 nats apart here takes about {found.needs}." in text
    assert "Equal runs, to the last bit, stand in several results, so that these hang together: first, second." in text
    assert [entry["verdict"] for entry in rules.evidence()] == [rules.OPEN, rules.NOT]
    drawing = ElementTree.fromstring(rules.picture())
    drawn = [node.get("class") for node in drawing.iter() if (node.get("class") or "").startswith("dot ")]
    assert drawn == ["dot open", "dot not"]


def test_a_verdict_that_turns_stops_the_generation(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(kept / "first", made_up())
    prediction = rules.Prediction("it is", "first", rules.loss("dora", "ia3"), -math.inf, math.inf)
    monkeypatch.setattr(rules, "RULES", (rules.Rule("", "A rule", "", (prediction,), "r", "Rank 8.", rules.HOLDS),))
    with pytest.raises(SystemExit, match=r"'A rule' holds here now, and `advise` says of r: Rank 8\."):
        rules.evidence()
    monkeypatch.setattr(rules, "RULES", (rules.Rule("", "A rule", "", (prediction,), "r", "Rank 8.", rules.NOT),))
    assert len(rules.evidence()) == 1


def test_the_classic_table_has_its_place(kept: Path) -> None:
    assert "## The classic table" not in rules.page()
    made = made_up()
    keep(kept / rules.CLASSIC, made.model_copy(update={"searches": []}))
    keep(kept / f"{rules.CLASSIC}_searched", made)
    text = rules.page()
    assert text.index("With one rate for all") < text.index("With the rate that a search found for each")
    for label in ("dora", "ia3", "untrained"):
        assert text.count(f"| {label} |") == 2


def test_the_share_of_the_first_singular_values(kept: Path) -> None:
    spectra = [{"norm": 5.0, "singular_values": [4.0, 3.0]}, {"norm": 10.0, "singular_values": [8.0, 6.0]}]
    for seed in range(2):
        (kept / f"analysis{seed}.json").write_text(json.dumps({"run": {"spectra": spectra}}))
    found = rules.energy(1)(kept)
    assert found.value == pytest.approx(0.64)
    assert found.seeds == 2


def test_what_advise_cites_is_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "RESULTS", ROOT / "benchmarks" / "results")
    assert json.loads(rules.EVIDENCE.read_text(encoding="utf-8")) == rules.evidence()
    assert rules.PAGE.read_text(encoding="utf-8") == rules.page()
    assert rules.PICTURE.read_text(encoding="utf-8") == rules.picture()
    linked = re.findall(r"\]\(([^)#]+)", rules.page())
    assert [link for link in linked if not (rules.PAGE.parent / link).exists()] == []
