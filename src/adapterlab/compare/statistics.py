"""Which differences are real: a bootstrap over evaluation rows and seeds, paired, corrected for all pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from adapterlab.compare.results import Difference, Interval, Run
from adapterlab.data import wilson

Array = NDArray[np.float64]
_LEAST, _MOST = 10_000, 200_000  # resamples
_CHUNK = 2_000  # resamples drawn at once, which bounds the memory


@dataclass
class Sheets:
    """What is resampled.

    Attributes:
        values: for each label `[seed, row]`: what the row gives the judge (1 or 0, or its summed loss in nats).
        seeds: for each label the seeds of its rows; one that was not trained has one row and stands for every seed.
        weights: `[row]`: what the row counts (1, or its labelled tokens).
    """

    values: Mapping[str, Array]
    seeds: Mapping[str, Sequence[int]]
    weights: Array
    _draws: dict[tuple[str, tuple[int, ...], int], Array] = field(default_factory=dict, repr=False)

    def mean(self, label: str, seeds: Sequence[int] | None = None) -> float:
        """Mean of the judge over rows and seeds."""
        return float(self.of(label, tuple(seeds or ())).mean(axis=0).sum() / self.weights.sum())

    def common(self, a: str, b: str) -> tuple[int, ...]:
        """Seeds that both labels have; those of the other when one was not trained."""
        sets = [set(self.seeds[label]) for label in (a, b) if len(self.seeds[label])]
        return tuple(sorted(set.intersection(*sets))) if sets else ()

    def draws(self, label: str, seeds: tuple[int, ...], count: int, seed: int) -> Array:
        """Resample rows and seeds: `[count]` means of the judge.

        Every label sees the same rows and seeds in a resample, which is what pairs them. A plain bootstrap of few
        seeds or rows shows too little of their spread: with S seeds their deviations are stretched by
        √(S / (S − 1)), and those of n rows by `widening(n)`.
        """
        key = (label, seeds, count)
        if key not in self._draws:
            values, n = self.of(label, seeds), len(self.weights)
            stretch = np.sqrt(len(values) / (len(values) - 1)) if len(values) > 1 else 0.0
            observed, wide = float(values.mean(axis=0).sum() / self.weights.sum()), widening(n)
            parts = []
            for start in range(0, count, _CHUNK):
                draw = np.random.default_rng([seed, start])
                size = min(_CHUNK, count - start)
                rows = draw.multinomial(n, np.full(n, 1 / n), size=size).astype(float)
                each = rows @ values.T / (rows @ self.weights)[:, None]  # [resample, seed]
                chosen = draw.integers(0, max(1, len(seeds)), size=(size, max(1, len(seeds)))) % len(values)
                middle = observed + wide * (each.mean(axis=1) - observed)
                each += (middle - each.mean(axis=1))[:, None]
                parts.append(middle + stretch * (np.take_along_axis(each, chosen, axis=1).mean(axis=1) - middle))
            self._draws[key] = np.concatenate(parts)
        return self._draws[key]

    def of(self, label: str, seeds: tuple[int, ...]) -> Array:
        """Return the values of a label `[seed, row]`: of these seeds, or all it has."""
        own = list(self.seeds[label])
        return self.values[label][[own.index(s) for s in seeds]] if own and seeds else self.values[label]


def sheets_of(runs: Iterable[Run], judge: str) -> Sheets | None:
    """Collect the judge's values of all finished runs, row by row; None while there are none."""
    values: dict[str, list[Sequence[float]]] = {}
    seeds: dict[str, list[int]] = {}
    weights: Sequence[float] = ()
    for run in runs:
        if run.status == "finished" and run.best is not None:
            given, weights = run.best.marks(judge)
            values.setdefault(run.label, []).append(given)
            seeds.setdefault(run.label, []).extend([] if run.is_untrained else [run.seed])
    if not values:
        return None
    arrays = {label: np.array(rows, dtype=float) for label, rows in values.items()}
    return Sheets(arrays, seeds, np.array(weights, dtype=float))


def widening(n: int) -> float:
    """Return by how much a percentile interval of the mean of n values is too narrow: √(n / (n − 1)) · t / z.

    t and z are the 97.5 % quantiles of Student's distribution with n − 1 degrees of freedom and of the normal one; t by
    the expansion of Cornish and Fisher. Source: What Teachers Should Know about the Bootstrap (arXiv:1411.5279), the
    expanded percentile interval.
    """
    if n < 2:
        return 1.0
    z, free = 1.959964, n - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return float(np.sqrt(n / free) * t / z)


def interval(sheets: Sheets, label: str, *, count: int = _LEAST, seed: int = 0) -> Interval:
    """Return the 95 % percentile interval of one label's mean.

    Answers that are right or wrong have Wilson's where there is one exam, or where all are alike: resampling what does
    not vary shows no uncertainty at all.
    """
    values, rows = sheets.values[label], len(sheets.weights)
    share = float(values.mean())
    if np.isin(values, (0, 1)).all() and (sheets.weights == 1).all() and (len(values) == 1 or share in (0, 1)):
        return wilson(round(share * rows), rows)
    return _percentiles(sheets.draws(label, tuple(sheets.seeds[label]), count, seed))


def differences(sheets: Sheets, level: float, *, seed: int = 0) -> list[Difference]:
    """Compare all pairs.

    The p-value is the share of resamples that lie at least as far from the observed difference as that lies from
    zero; with many pairs there are more resamples, so that a corrected value can fall below the level at all.

    Args:
        sheets: what to resample.
        level: of significance, after Holm's correction.
        seed: of the resampling.
    """
    pairs = [pair for pair in combinations(sheets.values, 2) if _comparable(sheets, *pair)]
    count = int(min(_MOST, max(_LEAST, 10 * len(pairs) / level)))
    found = []
    for a, b in pairs:
        seeds = sheets.common(a, b)
        value = sheets.mean(a, seeds) - sheets.mean(b, seeds)
        spread = sheets.draws(a, seeds, count, seed) - sheets.draws(b, seeds, count, seed)
        # Rounding must not turn two equal methods into different ones.
        far = np.abs(spread - value) >= abs(value) - 1e-12
        found.append((a, b, value, _percentiles(spread), float((1 + far.sum()) / (1 + count))))
    corrected = holm([p for *_, p in found])
    return [
        Difference(a=a, b=b, value=value, interval=span, p=p, p_holm=q, distinct=q < level)
        for (a, b, value, span, p), q in zip(found, corrected, strict=True)
    ]


def holm(values: Sequence[float]) -> list[float]:
    """Correct p-values for their number by Holm's step-down procedure.

    Args:
        values: p-values.

    Returns:
        Corrected ones in the same order, at most 1.
    """
    corrected, highest = [0.0] * len(values), 0.0
    for place, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min(1.0, (len(values) - place) * values[i]))
        corrected[i] = highest
    return corrected


def ranks(order: Sequence[str], found: Sequence[Difference]) -> dict[str, int]:
    """Give labels that cannot be told apart the same rank.

    From the best down, a label joins the group above it as long as nothing in that group is distinct from it; else a
    new group begins, with the label's place as its rank.

    Args:
        order: labels, best first.
        found: differences of pairs.
    """
    distinct = {frozenset((d.a, d.b)) for d in found if d.distinct}
    rank: dict[str, int] = {}
    group: list[str] = []
    for place, label in enumerate(order, 1):
        if any(frozenset((label, member)) in distinct for member in group):
            group = []
        group.append(label)
        rank[label] = rank[group[0]] if len(group) > 1 else place
    return rank


def _comparable(sheets: Sheets, a: str, b: str) -> bool:
    both = len(sheets.seeds[a]) and len(sheets.seeds[b])
    return bool(sheets.common(a, b)) or not both


def _percentiles(draws: Array) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
