"""One paragraph in plain words: which method to take, on what evidence, and what stays open."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from adapterlab.compare.power import WORTH, cheapest, needs, spread_of, with_more_seeds
from adapterlab.compare.results import UNTRAINED, Comparison, Recommendation, Run, Standing

ONE_SEED = (
    "What is compared is one trained set of weights of each method, not the methods: another seed may order them "
    "otherwise. Set seeds=3 or more to compare methods."
)


def recommend(comparison: Comparison) -> Recommendation:
    """Say which method to take for the best result, for least memory and for least time.

    Memory and time are compared among methods that can be told from the untrained model and are better; a method that
    learns nothing may be cheap, but nobody wants it.

    Args:
        comparison: with standings and differences.
    """
    ranked = [s for s in comparison.standings if s.rank is not None and s.label != UNTRAINED]
    if not ranked:
        return Recommendation(text="No method has a finished run yet, so there is nothing to recommend.")
    best, undecided = ranked[0], _undecided(comparison, ranked)
    helpful = [s for s in ranked if _beats_untrained(comparison, s)]
    memory = _least(comparison, helpful or ranked, _peak)
    time = _least(comparison, helpful or ranked, _seconds)
    sentences = [_best(comparison, best), _open(comparison, ranked, undecided), _gain(comparison, best, helpful)]
    sentences.append(ONE_SEED if comparison.of_one_seed else "")
    for what, found, amount in (("memory", memory, _gib), ("time", time, _clock)):
        if found:
            at = _value(comparison, found)
            sentences.append(f"For least {what} take {found.label}: {amount(comparison, found)}, at {at}.")
    sentences.append(_failed(comparison))
    return Recommendation(
        text=" ".join(filter(None, sentences)),
        best=best.label,
        least_memory=memory.label if memory else None,
        least_time=time.label if time else None,
        undecided=[s.label for s in undecided],
    )


def _best(comparison: Comparison, best: Standing) -> str:
    rows = comparison.data.get("eval_rows", "the")
    seeds = f"{best.finished} seed{'s' if best.finished != 1 else ''}"
    low, high = best.interval or (0.0, 0.0)
    sentence = (
        f"For the best result take {best.label}: {_value(comparison, best)} on {rows} evaluation rows "
        f"({seeds}; 95 % interval {_number(comparison, low)} to {_number(comparison, high)})"
    )
    costs = [(_peak, _gib(comparison, best)), (_seconds, f"{_clock(comparison, best)} of training")]
    known = [text for figure, text in costs if comparison.mean(best.label, figure) is not None]
    return f"{', '.join([sentence, *known])}."


def _open(comparison: Comparison, ranked: Sequence[Standing], undecided: Sequence[Standing]) -> str:
    if len(ranked) < 2:
        return ""
    if not undecided:
        best, second = ranked[0], ranked[1]
        apart = abs((best.value or 0.0) - (second.value or 0.0))
        gap = f"{100 * apart:.1f} points" if comparison.judge == "score" else f"{apart:.4f} nats a token"
        return f"Every other one is worse at {_level(comparison)}; the nearest, {second.label}, by {gap}."
    names = listed([s.label for s in undecided])
    cheap = _least(comparison, undecided, _seconds)
    many = cheap is not None and len(undecided) > 1
    hint = f" Of these, {cheap.label} trains fastest ({_clock(comparison, cheap)})." if cheap and many else ""
    return f"It cannot be told apart from {names} at {_level(comparison)}. {_would_take(comparison, undecided)}{hint}"


def _would_take(comparison: Comparison, undecided: Sequence[Standing]) -> str:
    """What it would take to tell a difference that matters, by how far rows and seeds spread in this comparison."""
    difference = WORTH[comparison.judge]
    gap = f"{100 * difference:g} points" if comparison.judge == "score" else f"{difference:g} nats a token"
    best = next(s.label for s in comparison.standings if s.rank is not None and s.label != UNTRAINED)
    spread = spread_of(comparison, [(best, s.label) for s in undecided])
    pairs, level = max(1, len(comparison.differences)), comparison.level
    if spread is None:
        return f"How many rows and seeds would tell them apart cannot be said: {_why_unknown(comparison, best)}."
    need = cheapest(needs(spread, difference, pairs=pairs, level=level))
    if spread.seeds is None and need is not None:
        return (
            f"To tell {gap} apart here takes at least {need.rows:,} evaluation rows. How many seeds of each method it "
            "takes cannot be said from one."
        )
    need = need or with_more_seeds(spread, difference, pairs=pairs, level=level)
    return f"To tell {gap} apart here takes about {need.rows:,} evaluation rows and {need.seeds} seeds of each method."


def _why_unknown(comparison: Comparison, best: str) -> str:
    """Why no spread of differences could be estimated."""
    exam = next(run.best for run in comparison.runs_of(best) if run.best is not None)
    if len(exam.marks(comparison.judge)[0]) < 2:
        return "one evaluation row says nothing of how far rows spread"
    return f"none of them has finished a seed that {best} has finished too"


def _level(comparison: Comparison) -> str:
    return f"the {100 * comparison.level:g} % level, corrected for all pairs"


def _gain(comparison: Comparison, best: Standing, helpful: Sequence[Standing]) -> str:
    base = next((s for s in comparison.standings if s.label == UNTRAINED and s.value is not None), None)
    if base is None or best.value is None or base.value is None:
        return ""
    if not helpful:
        return f"No method is better than the untrained model ({_value(comparison, base)}) at {_level(comparison)}."
    return f"The untrained model has {_value(comparison, base)}."


def _failed(comparison: Comparison) -> str:
    failed = [s.label for s in comparison.standings if s.failed and not s.finished]
    return f"Failed, with the reason in the table: {listed(failed)}." if failed else ""


def _undecided(comparison: Comparison, ranked: Sequence[Standing]) -> list[Standing]:
    apart = {frozenset((d.a, d.b)) for d in comparison.differences if d.distinct}
    return [s for s in ranked[1:] if frozenset((s.label, ranked[0].label)) not in apart]


def _beats_untrained(comparison: Comparison, standing: Standing) -> bool:
    sign = 1 if comparison.higher_is_better else -1
    for d in comparison.differences:
        if {d.a, d.b} == {standing.label, UNTRAINED}:
            return d.distinct and sign * (d.value if d.a == standing.label else -d.value) > 0
    return False


def _least(comparison: Comparison, among: Sequence[Standing], figure: Callable[[Run], float | None]) -> Standing | None:
    known = [(value, s) for s in among if (value := comparison.mean(s.label, figure)) is not None]
    return min(known, key=lambda pair: pair[0])[1] if known else None


def _value(comparison: Comparison, standing: Standing) -> str:
    text = _number(comparison, standing.value or 0.0)
    return f"{text} right" if comparison.judge == "score" else f"a loss of {text}"


def _number(comparison: Comparison, value: float) -> str:
    return f"{value:.0%}".replace("%", " %") if comparison.judge == "score" else f"{value:.3f}"


def _peak(run: Run) -> float | None:
    return run.peak_memory


def _seconds(run: Run) -> float | None:
    return run.train_seconds


def _gib(comparison: Comparison, standing: Standing) -> str:
    peak = comparison.mean(standing.label, _peak)
    return f"{(peak or 0) / 2**30:.2f} GiB at its peak"


def _clock(comparison: Comparison, standing: Standing) -> str:
    seconds = comparison.mean(standing.label, _seconds) or 0
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence has them: a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
