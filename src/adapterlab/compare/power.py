"""How many evaluation rows and seeds it takes to tell two methods apart, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, Literal

import numpy as np

from adapterlab.compare.results import UNTRAINED, Comparison
from adapterlab.compare.statistics import Sheets, sheets_of
from adapterlab.errors import ConfigError

if TYPE_CHECKING:
    from adapterlab.compare.config import CompareConfig

Judge = Literal["score", "loss"]
SEEDS = (2, 3, 5, 10, 20)
POWER = 0.8
WORTH = {"score": 0.05, "loss": 0.05}  # the difference that is asked about unless another is given
_ASKED = {"score": "points", "loss": "nats"}
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

    def by_row(self, seeds: int) -> float:
        """Variance of the mean over S seeds that one row adds, as a bootstrap over rows and seeds has it.

        σ_v² + 3 σ_e² / S; with one seed, where nothing but rows is drawn, σ_v² + σ_e².
        """
        return self.rows**2 + (3 if seeds > 1 else 1) * self.rest**2 / seeds

    def by_seed(self, seeds: int) -> float:
        """Variance of the mean over S seeds that no number of rows takes away: σ_u² / S."""
        return (self.seeds or 0) ** 2 / seeds


# Taken where nothing is known of the model and rows at hand: nine methods on sums of two numbers, the mean over their
# 36 pairs, two seeds and 100 rows (benchmarks/results/compare_smollm2).
TYPICAL = {
    "score": Spread(0.011, 0.061, 0.347, "typical: nine methods with SmolLM2-135M on sums"),
    "loss": Spread(0.016, 0.088, 0.219, "typical: nine methods with SmolLM2-135M on sums"),
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

    With SE² = σ_u² / S + (σ_v² + 3 σ_e² / S) / n for S seeds and n rows, a difference D is found significant in a share
    1 − β of all comparisons where D = (z_{1−α/2} + z_{1−β}) · SE. So

        n = (σ_v² + 3 σ_e² / S) / ((D / (z_{1−α/2} + z_{1−β}))² − σ_u² / S).

    The mean itself varies by σ_e² / (S n) and not three times that: it is the bootstrap over both rows and seeds, by
    which methods are ranked, that draws this part thrice. With one seed it draws rows alone and the factor is 1; for
    answers that are right or wrong, n is then the number of pairs of McNemar's test, σ_v² = ψ − D² with the share ψ of
    rows on which exactly one of the two is right.

    Sources: "The Pigeonhole Bootstrap", arXiv 0712.1111, for the factor; "Sample Size for Testing Differences in
    Proportions for the Paired-Sample Design", Connor, Biometrics 43, 1987, with the standard error under the
    alternative, as a bootstrap sees it; "Adding Error Bars to Evals", arXiv 2411.00640, for rows in pairs.

    Args:
        spread: of the difference.
        difference: to be told apart, in the judge's unit, above 0.
        seeds: of each method.
        level: of significance of this one pair, any correction for other pairs included.
        power: share of comparisons that should find it.
    """
    wanted = (difference / _quantiles(level, power)) ** 2 - spread.by_seed(seeds)
    return None if wanted <= 0 else max(2, math.ceil(spread.by_row(seeds) / wanted))


def least_difference(spread: Spread, seeds: int, rows: int, *, level: float, power: float = POWER) -> float:
    """Return the smallest difference that is found in a share `power` of comparisons: (z_{1−α/2} + z_{1−β}) · SE."""
    return _quantiles(level, power) * math.sqrt(spread.by_seed(seeds) + spread.by_row(seeds) / rows)


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


@dataclass(frozen=True)
class Outlook:
    """What a comparison of some methods can tell.

    Attributes:
        judge: what ranks.
        difference: that is asked about, in the judge's unit.
        methods: that are compared, the untrained model not counted.
        pairs: of all these and the untrained model.
        level: of significance after correction for all pairs.
        power: share of comparisons that find the difference.
        rows: evaluation rows that there are; None where nobody said.
        spread: of the difference of two methods.
        needs: for each number of seeds.
    """

    judge: Judge
    difference: float
    methods: int
    pairs: int
    level: float
    power: float
    rows: int | None
    spread: Spread
    needs: list[Need]


def outlook(
    config: CompareConfig | None = None,
    pilot: Comparison | None = None,
    *,
    points: float | None = None,
    nats: float | None = None,
    discordance: float | None = None,
) -> Outlook:
    """Say what a comparison needs to tell a difference apart.

    Args:
        config: of the comparison to come, which says how many methods there are; None for that of the pilot, else two.
        pilot: a comparison on such rows, from which the spreads are estimated; None for typical ones.
        points: difference of the share of right answers, in percentage points; 5 by default where that judges.
        nats: difference of the loss, in nats a token; 0.05 by default where that judges.
        discordance: share of rows on which exactly one of two methods is right, instead of a pilot.

    Raises:
        ConfigError: two differences are given, the pilot has another judge or too few finished runs, or a share or
            difference is out of range.
    """
    if points is not None and nats is not None:
        raise ConfigError(f"points={points:g} and nats={nats:g} are two differences; give one of them.")
    judge = _judge(config, pilot, points, nats)
    difference = points / 100 if points is not None else WORTH[judge] if nats is None else nats
    if discordance is not None and (pilot is not None or judge == "loss"):
        raise ConfigError(f"discordance={discordance:g} is for a score without a pilot, which would say it itself.")
    given = None if discordance is None else of_discordance(discordance, difference)
    spread = given or (TYPICAL[judge] if pilot is None else spread_of(pilot))
    if spread is None:
        raise ConfigError("The pilot has fewer than two methods with finished runs of the same seed. Let it finish.")
    methods = len(config.contenders()) if config else len(pilot.labels) - 1 if pilot else 2
    pairs = methods * (methods + 1) // 2
    level = config.level if config else pilot.level if pilot else 0.05
    rows = _rows(config, pilot)
    found = needs(spread, difference, pairs=pairs, level=level, rows=rows)
    return Outlook(judge, difference, methods, pairs, level, POWER, rows, spread, found)


def _judge(config: CompareConfig | None, pilot: Comparison | None, points: float | None, nats: float | None) -> Judge:
    asked: Judge | None = "score" if points is not None else "loss" if nats is not None else None
    if pilot is not None and asked not in (None, pilot.judge):
        raise ConfigError(f"The pilot is judged by its {pilot.judge}: ask with {_ASKED[pilot.judge]}.")
    return asked or (pilot.judge if pilot else "loss" if config and config.judge == "loss" else "score")


def _rows(config: CompareConfig | None, pilot: Comparison | None) -> int | None:
    """Evaluation rows, as far as is known without reading any."""
    if config is not None:
        size = config.data.eval_size if isinstance(config.data.eval_size, int) else None
        known = [n for n in (config.evaluation.limit, config.data.eval_limit, size) if n]
        return min(known) if known else None
    return pilot.data.get("eval_rows") if pilot else None


def cheapest(found: Sequence[Need]) -> Need | None:
    """Return the fewest seeds that do with a moderate number of rows, else with any; None where none do."""
    enough = [need for need in found if need.rows is not None]
    return next((need for need in enough if (need.rows or 0) <= _MANY), enough[-1] if enough else None)


def with_more_seeds(
    spread: Spread, difference: float, *, pairs: int = 1, level: float = 0.05, power: float = POWER
) -> Need:
    """Return the fewest seeds that do with a moderate number of rows, where none of the usual numbers of seeds do.

    `rows_needed` solved for S: with w = D / (z_{1−α/2} + z_{1−β}) and n rows, S = (n σ_u² + 3 σ_e²) / (n w² − σ_v²).
    Where the rows themselves spread too far for n, it is taken for twice the σ_v² / w² that no number of seeds saves.

    Args:
        spread: of the difference.
        difference: to be told apart, in the judge's unit, above 0.
        pairs: that are compared.
        level: of significance after correction.
        power: share of comparisons that should find it.
    """
    each = level / max(1, pairs)
    wanted = (difference / _quantiles(each, power)) ** 2
    rows = max(_MANY, 2 * spread.rows**2 / wanted)
    fewest = (rows * (spread.seeds or 0) ** 2 + 3 * spread.rest**2) / (rows * wanted - spread.rows**2)
    seeds = max(SEEDS[0], math.ceil(fewest))
    return Need(seeds, rows_needed(spread, difference, seeds, level=each, power=power))


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
    return Spread(
        None, math.sqrt(share - difference**2), 0.0, f"assumed: the two disagree on {100 * share:g} % of rows"
    )


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
    seeds = [seed for seed, _, _ in found if seed is not None]
    return Spread(
        _deviation(seeds) if seeds else None,
        _deviation([row for _, row, _ in found]),
        _deviation([rest for _, _, rest in found]),
        f"measured: {comparison.name}",
    )


def _deviation(variances: Sequence[float]) -> float:
    """The standard deviation of which these are estimates of the variance."""
    return math.sqrt(max(0.0, fmean(variances)))


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
