"""How many evaluation rows and seeds it takes to tell two methods apart, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Literal

import numpy as np

from adapterlab.compare.results import UNTRAINED, Comparison
from adapterlab.compare.statistics import Sheets, sheets_of
from adapterlab.errors import ConfigError

Judge = Literal["score", "loss"]
SEEDS = (2, 3, 5, 10, 20)
POWER = 0.8
WORTH = {"score": 0.05, "loss": 0.05}  # the difference that is asked about unless another is given
_MANY = 1_000  # rows up to which more seeds are not worth their training


@dataclass(frozen=True)
class Spread:
    """How the difference of two methods varies, as standard deviations in the judge's unit.

    d[s, i] = Δ + u[s] + v[i] + e[s, i] for seed s and evaluation row i.

    Attributes:
        seeds: of u, what a seed does to all rows; None where only one seed is known.
        rows: of v, what a row does in all seeds.
        rest: of e, what is left.
        source: where these figures come from.
    """

    seeds: float | None
    rows: float
    rest: float
    source: str

    def error(self, seeds: int, rows: int) -> float:
        """Standard error of the mean difference: √(σ_u² / S + σ_v² / n + σ_e² / (S n))."""
        return math.sqrt(((self.seeds or 0) ** 2 + self.rest**2 / rows) / seeds + self.rows**2 / rows)


# Nine methods on sums of two numbers, mean over their 36 pairs (benchmarks/results/compare_smollm2): what is taken where
# nothing is known of the model and rows at hand.
TYPICAL = {
    "score": Spread(0.015, 0.078, 0.362, "typical: nine methods with SmolLM2-135M on sums"),
    "loss": Spread(0.029, 0.089, 0.257, "typical: nine methods with SmolLM2-135M on sums"),
}


@dataclass(frozen=True)
class Need:
    """What one number of seeds asks for.

    Attributes:
        seeds: of each method.
        rows: evaluation rows that the difference needs; None where no number of rows is enough.
        least: the smallest difference that is told apart with the rows there are; None where none are given.
    """

    seeds: int
    rows: int | None
    least: float | None = None


def rows_needed(spread: Spread, difference: float, seeds: int, *, level: float, power: float = POWER) -> int | None:
    """Return how many evaluation rows tell a difference apart; None where the seeds alone spread too far.

    The mean difference over S seeds and n rows has the standard error SE = √(σ_u² / S + σ_v² / n + σ_e² / (S n)), and a
    difference D is found significant in a share 1 − β of all comparisons where SE = D / (z_{1−α/2} + z_{1−β}). So

        n = (σ_v² + σ_e² / S) / ((D / (z_{1−α/2} + z_{1−β}))² − σ_u² / S).

    For answers that are right or wrong, and one seed, this is the number of pairs of McNemar's test, with the share of
    rows ψ on which exactly one of the two is right: σ_v² = ψ − D².

    Sources: "Sample Size for Testing Differences in Proportions for the Paired-Sample Design", Connor, Biometrics 43,
    1987, with the standard error under the alternative, as a bootstrap sees it; the three spreads as in "Adding Error
    Bars to Evals", arXiv 2411.00640, which pairs rows and draws answers again.

    Args:
        spread: of the difference.
        difference: to be told apart, in the judge's unit, above 0.
        seeds: of each method.
        level: of significance of this one pair, any correction for other pairs included.
        power: share of comparisons that should find it.
    """
    wanted = (difference / _quantiles(level, power)) ** 2 - (spread.seeds or 0) ** 2 / seeds
    return None if wanted <= 0 else max(2, math.ceil((spread.rows**2 + spread.rest**2 / seeds) / wanted))


def least_difference(spread: Spread, seeds: int, rows: int, *, level: float, power: float = POWER) -> float:
    """Return the smallest difference that is found in a share `power` of comparisons: (z_{1−α/2} + z_{1−β}) · SE."""
    return _quantiles(level, power) * spread.error(seeds, rows)


def needs(
    spread: Spread,
    difference: float,
    *,
    pairs: int = 1,
    level: float = 0.05,
    power: float = POWER,
    seeds: Iterable[int] = SEEDS,
    rows: int | None = None,
) -> list[Need]:
    """Say for each number of seeds how many rows a difference needs.

    Args:
        spread: of the difference: `spread_of` a comparison, `of_discordance`, or `TYPICAL`.
        difference: to be told apart, in the judge's unit: 0.05 is five points of a score, or 0.05 nats a token.
        pairs: that are compared; the level is divided by their number, the most that Holm's correction can ask for.
        level: of significance after correction.
        power: share of comparisons that should find it.
        seeds: numbers of seeds to look at.
        rows: that there are.

    Raises:
        ConfigError: the difference is not above 0, or the power not between 0 and 1.
    """
    if not difference > 0 or not math.isfinite(difference):
        raise ConfigError(f"A difference to tell apart is above 0; received {difference:g}.")
    if not 0 < power < 1:
        raise ConfigError(f"power={power:g} should be a share between 0 and 1, such as {POWER:g}.")
    each = level / max(1, pairs)
    return [
        Need(
            number,
            rows_needed(spread, difference, number, level=each, power=power),
            None if rows is None else least_difference(spread, number, rows, level=each, power=power),
        )
        for number in seeds
    ]


def cheapest(found: Sequence[Need]) -> Need | None:
    """Return the fewest seeds that do with a moderate number of rows, else with any; None where none do."""
    enough = [need for need in found if need.rows is not None]
    return next((need for need in enough if (need.rows or 0) <= _MANY), enough[-1] if enough else None)


def of_discordance(share: float, difference: float) -> Spread:
    """Return the spread of a score of which nothing is known but on how many rows two methods disagree.

    All of it is taken to lie between rows, σ_v² = ψ − D², which no number of seeds averages out: the careful side.

    Args:
        share: ψ, of the rows on which exactly one of the two is right.
        difference: D of the scores; it cannot be larger than ψ.

    Raises:
        ConfigError: the share is not between the difference and 1.
    """
    if not difference <= share <= 1:
        raise ConfigError(
            f"discordance={share:g} should be a share between the difference, {difference:g}, and 1: two methods whose "
            "scores differ by so much disagree on at least as many rows."
        )
    return Spread(None, math.sqrt(share - difference**2), 0.0, f"assumed: the two disagree on {100 * share:g} % of rows")


def spread_of(comparison: Comparison, pairs: Iterable[tuple[str, str]] | None = None) -> Spread | None:
    """Estimate the spread from a comparison that was run: a pilot, or the one at hand.

    The three variances are those of a crossed design with random rows and seeds, from its mean squares:
    σ_e² = MS_e, σ_u² = (MS_seeds − MS_e) / n, σ_v² = (MS_rows − MS_e) / S, each the mean over the pairs and at least 0.

    Source: "Variance Components", Searle, Casella and McCulloch, 1992.

    Args:
        comparison: with finished runs.
        pairs: labels to look at; those of the best method with every other by default.

    Returns:
        The spread; None where fewer than two trained methods have finished.
    """
    sheets = sheets_of(comparison.runs, comparison.judge)
    if sheets is None:
        return None
    trained = [s.label for s in comparison.standings if s.label in sheets.values and s.label != UNTRAINED]
    chosen = [(trained[0], other) for other in trained[1:]] if pairs is None else list(pairs)
    found = [parts for a, b in chosen if (parts := _variances(sheets, a, b)) is not None]
    if not found:
        return None
    several = [seeds for seeds, *_ in found if seeds is not None]
    rows, rest = (math.sqrt(max(0.0, fmean(parts[i] for parts in found))) for i in (1, 2))
    return Spread(math.sqrt(max(0.0, fmean(several))) if several else None, rows, rest, f"measured: {comparison.name}")


def _variances(sheets: Sheets, a: str, b: str) -> tuple[float | None, float, float] | None:
    """σ_u², σ_v² and σ_e² of one pair, which may come out below 0; None without a seed in common."""
    seeds = sheets.common(a, b)
    if not seeds or len(sheets.weights) < 2:
        return None
    d, w = sheets.of(a, seeds) - sheets.of(b, seeds), sheets.weights
    # What a row adds to the mean of all tokens, less what it adds by being longer than others.
    d = (d - d.mean(axis=0).sum() / w.sum() * (w - w.mean())) / w.mean()
    s, n = d.shape
    by_seed, by_row = d.mean(axis=1, keepdims=True), d.mean(axis=0, keepdims=True)
    between = s * float(np.square(by_row - d.mean()).sum()) / (n - 1)
    if s == 1:
        return None, between, 0.0
    rest = float(np.square(d - by_seed - by_row + d.mean()).sum()) / ((s - 1) * (n - 1))
    apart = n * float(np.square(by_seed - d.mean()).sum()) / (s - 1)
    return (apart - rest) / n, (between - rest) / s, rest


def _quantiles(level: float, power: float) -> float:
    normal = NormalDist()
    return normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)
