"""Which differences are real: a bootstrap over evaluation rows and seeds, paired, corrected for all pairs."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapterlab.compare.results import Difference, Interval, Run
from adapterlab.data import wilson

Array = NDArray[np.float64]
_LEAST, _MOST = 10_000, 200_000  # resamples
DRAFT = _LEAST  # resamples while runs are missing
_CHUNK = 2_000  # resamples drawn at once, which bounds the memory
ALL_PAIRS = 100  # labels of which all pairs are compared; the time for that grows with the square of their number
_BLOCK = 200  # pairs whose resamples are in memory at once, where not all pairs are compared


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
        self.resample([(label, seeds)], count, seed)
        return self._draws[label, seeds, count]

    def resample(self, wanted: Iterable[tuple[str, tuple[int, ...]]], count: int, seed: int) -> None:
        """Make the draws of several labels at once: choosing the rows takes longest, and is the same for all.

        Args:
            wanted: labels, each with seeds.
            count: resamples.
            seed: of the resampling.
        """
        parts: dict[tuple[str, tuple[int, ...]], list[Array]] = {
            key: [] for key in wanted if (*key, count) not in self._draws
        }
        for start in range(0, count, _CHUNK) if parts else ():
            rows, state = _rows(len(self.weights), min(_CHUNK, count - start), seed, start)
            weights = (rows @ self.weights)[:, None]
            for (label, seeds), found in parts.items():
                found.append(self._resampled(rows @ self.of(label, seeds).T / weights, label, seeds, state))
        for key, found in parts.items():
            self._draws[(*key, count)] = np.concatenate(found)

    def forget(self, labels: Collection[str]) -> None:
        """Give the memory of labels' draws back."""
        self._draws = {key: draws for key, draws in self._draws.items() if key[0] not in labels}

    def _resampled(self, each: Array, label: str, seeds: tuple[int, ...], state: Mapping[str, Any]) -> Array:
        """Means of some resamples, from those with resampled rows alone: `each` is `[resample, seed]`."""
        values, wide = self.of(label, seeds), widening(len(self.weights))
        draw = np.random.default_rng()
        draw.bit_generator.state = state  # every label sees the same seeds
        stretch = np.sqrt(len(values) / (len(values) - 1)) if len(values) > 1 else 0.0
        observed = float(values.mean(axis=0).sum() / self.weights.sum())
        chosen = draw.integers(0, max(1, len(seeds)), size=(len(each), max(1, len(seeds)))) % len(values)
        middle = observed + wide * (each.mean(axis=1) - observed)
        each = each + (middle - each.mean(axis=1))[:, None]
        return np.asarray(middle + stretch * (np.take_along_axis(each, chosen, axis=1).mean(axis=1) - middle))

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


@functools.lru_cache(maxsize=_LEAST // _CHUNK)
def _rows(n: int, size: int, seed: int, start: int) -> tuple[Array, Mapping[str, Any]]:
    """How often each of n rows is in each of some resamples, `[resample, row]`, and the generator's state after."""
    draw = np.random.default_rng([seed, start])
    return draw.multinomial(n, np.full(n, 1 / n), size=size).astype(float), draw.bit_generator.state


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


def differences(
    sheets: Sheets, level: float, *, seed: int = 0, references: Collection[str] = (), count: int | None = None
) -> list[Difference]:
    """Compare all pairs, or each label with a few.

    The p-value is the share of resamples that lie at least as far from the observed difference as that lies from
    zero; with many pairs there are more resamples, so that a corrected value can fall below the level at all.

    Args:
        sheets: what to resample.
        level: of significance, after Holm's correction.
        seed: of the resampling.
        references: labels that all others are compared with, and nobody else; none: all pairs.
        count: resamples; None: as many as the number of pairs asks for.
    """
    pairs = [pair for pair in _pairs(sheets.values, references) if _comparable(sheets, *pair)]
    count = count or int(min(_MOST, max(_LEAST, 10 * len(pairs) / level)))
    size = _BLOCK if references else max(1, len(pairs))
    found = []
    for start in range(0, len(pairs), size):
        block = pairs[start : start + size]
        sheets.resample([(label, sheets.common(*pair)) for pair in block for label in pair], count, seed)
        found += [(*pair, *_compared(sheets, pair, count, seed)) for pair in block]
        if references:
            sheets.forget({label for pair in block for label in pair}.difference(references))
    corrected = holm([p for *_, p in found])
    return [
        Difference(a=a, b=b, value=value, interval=span, p=p, p_holm=q, distinct=q < level)
        for (a, b, value, span, p), q in zip(found, corrected, strict=True)
    ]


def _pairs(labels: Collection[str], references: Collection[str]) -> Iterable[tuple[str, str]]:
    if not references:
        return combinations(labels, 2)
    others = [label for label in labels if label not in references]
    return [*combinations(references, 2), *((first, label) for label in others for first in references)]


def _compared(sheets: Sheets, pair: tuple[str, str], count: int, seed: int) -> tuple[float, Interval, float]:
    """The difference of two labels, its interval and its p-value."""
    (a, b), seeds = pair, sheets.common(*pair)
    value = sheets.mean(a, seeds) - sheets.mean(b, seeds)
    spread = sheets.draws(a, seeds, count, seed) - sheets.draws(b, seeds, count, seed)
    # Rounding must not turn two equal methods into different ones.
    far = np.abs(spread - value) >= abs(value) - 1e-12
    return value, _percentiles(spread), float((1 + far.sum()) / (1 + count))


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


def ranks(order: Sequence[str], found: Sequence[Difference], references: Collection[str] = ()) -> dict[str, int]:
    """Give labels that cannot be told apart the same rank.

    From the best down, a label joins the group above it as long as nothing in that group is distinct from it; else a
    new group begins, with the label's place as its rank.

    Args:
        order: labels, best first.
        found: differences of pairs.
        references: as for `differences`; a group is then joined by what cannot be told from its references.
    """
    distinct = {frozenset((d.a, d.b)) for d in found if d.distinct}
    rank: dict[str, int] = {}
    group: list[str] = []
    for place, label in enumerate(order, 1):
        asked = [member for member in group if member in references] if references else group
        if (group and not asked) or any(frozenset((label, member)) in distinct for member in asked):
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
