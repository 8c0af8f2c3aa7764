from __future__ import annotations

from decimal import Decimal

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from adapterlab.data import DataConfig, Example, Splits, load_data, number_in, scorer_for, wilson
from adapterlab.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72", "72"),
        ("so 3 + 4 = 7.", "7"),
        ("#### 72", "72"),
        ("#### 72\nIs that 5 more?", "72"),
        ("#### 1\nno:\n#### 2", "2"),
        ("#### $1,234.50.", "1234.5"),
        ("it costs $1,234,567", "1234567"),
        ("-5", "-5"),
        ("−5 degrees", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("x = -0.50", "-0.5"),
        ("8-5", "5"),
        ("8 - 5", "5"),
        ("(2)-3", "3"),
        (".5", "0.5"),
        ("007", "7"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("\\boxed{42}", "42"),
        ("50%", "50"),
        ("5 apples.", "5"),
        ("####", None),
        ("#### none, though 5", "5"),
        ("no number", None),
        ("", None),
    ],
)
def test_final_numbers(text, expected):
    assert number_in(text) == (None if expected is None else Decimal(expected))


def splits_of(*answers):
    rows = [Example(messages=({"role": "user", "content": "Q"},), answer=a, row=i) for i, a in enumerate(answers, 1)]
    return Splits(rows, rows, "question-answer", "rows.jsonl", "rows.jsonl")


def config(**fields):
    return DataConfig(**{"path": "rows.jsonl", **fields})


def test_number_scorer_compares_values():
    splits = splits_of("1200")
    scorer = scorer_for(config(scorer="number"), splits)
    example = splits.eval[0]
    assert [scorer(t, example) for t in ("1,200.00", "#### $1200.", "1200 or 1201", "-1200", "none", "")] == [
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ]


def test_exact_scorer_ignores_case_and_spacing():
    splits = splits_of("New  York")
    scorer = scorer_for(config(scorer="exact"), splits)
    assert [scorer(t, splits.eval[0]) for t in (" new york\n", "newyork", "New York.")] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        (["5", "-1,000.5"], "number"),
        (["yes", "5"], "exact"),
        (["yes", "a long answer " * 9], None),
        (["one\ntwo"], None),
        ([None], None),
    ],
)
def test_auto_takes_what_fits_the_references(answers, name):
    scorer = scorer_for(config(), splits_of(*answers))
    assert (scorer and scorer.name) == name


def test_scorers_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"needs a number in every answer; evaluation row 2 has 'yes'"):
        scorer_for(config(scorer="number"), splits_of("5", "yes"))
    with pytest.raises(DataError, match=r"needs a reference.*data\.scorer=none"):
        scorer_for(config(scorer="exact"), splits_of(None))
    with pytest.raises(DataError, match=r"verifier needs a generated task.*rows\.jsonl"):
        scorer_for(config(scorer="verifier"), splits_of("5"))
    assert scorer_for(config(scorer="none"), splits_of("5")) is None


def test_verifier_counts_full_credit_only():
    cfg = DataConfig(task="chain_sum", task_args={"min_terms": 2, "max_terms": 2}, limit=40, eval_size=8)
    splits = load_data(cfg)
    scorer = scorer_for(cfg, splits)
    assert scorer.name == "verifier"
    for example in splits.eval:
        wrong = str(int(example.answer) + 1)
        assert [scorer(t, example) for t in (f" {example.answer}\n", wrong, "", "garbage")] == [1.0, 0.0, 0.0, 0.0]


def test_partial_credit_is_not_a_right_answer():
    cfg = DataConfig(task="spell_backward", limit=20, eval_size=2)
    splits = load_data(cfg)
    from adapterlab.data.tasks import make_task

    task = make_task("spell_backward", {}, seed=0, size=1)
    example = splits.eval[0]
    close = example.answer[:-1]
    assert 0 < task.score_answer(close, example.meta["entry"]) < 1, "the premise: this verifier gives partial credit"
    assert scorer_for(cfg, splits)(close, example) == 0.0
    assert scorer_for(cfg, splits)(example.answer, example) == 1.0


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("hits", "n"), [(0, 10), (1, 29), (8, 10), (81, 263), (10, 10), (2.5, 7)])
def test_wilson_ends_solve_the_score_equation(hits, n, confidence):
    # The interval's ends are where the normal score test just rejects: (p̂ - p)² = z² p (1 - p) / n.
    z, share = norm.ppf((1 + confidence) / 2), hits / n
    low, high = wilson(hits, n, confidence)

    def gap(p):
        return (share - p) ** 2 - z * z * p * (1 - p) / n

    assert low == pytest.approx(0.0 if hits == 0 else brentq(gap, 1e-12, min(share, 1 - 1e-9)), abs=1e-9)
    assert high == pytest.approx(1.0 if hits == n else brentq(gap, max(share, 1e-9), 1 - 1e-12), abs=1e-9)


def test_wilson_matches_published_values_and_refuses_nonsense():
    # Newcombe (1998), Statistics in Medicine 17:857-872, table I, method 3.
    for (hits, n), expected in {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611)}.items():
        assert wilson(hits, n) == pytest.approx(expected, abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes=5, n=3"):
        wilson(5, 3)
    with pytest.raises(ValueError, match="confidence=95"):
        wilson(1, 3, 95)
