"""The field's rules, what would count as holding, and what kept results say: docs/rules.md and the facts of `advise`.

Every rule predicts in which range a figure lies. Its 95 % interval decides: wholly inside, wholly outside, or neither.
What has no result yet is named with the command that makes one. What `advise` makes of a rule was chosen for its
verdict: one that turns stops the generation until somebody has looked again. `scripts/generate.py` calls this.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from adapterlab.compare.power import TYPICAL, cheapest, needs, spread_of, with_more_seeds
from adapterlab.compare.report import table
from adapterlab.compare.report.svg import Axis, Plot
from adapterlab.compare.results import UNTRAINED, Comparison, Interval, Run, load
from adapterlab.compare.statistics import Sheets, differences, sheets_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "rules.md"
PICTURE = ROOT / "docs" / "rules.svg"
EVIDENCE = ROOT / "src" / "adapterlab" / "compare" / "evidence.json"
HOLDS, NOT, OPEN, UNMEASURED = "holds here", "does not hold here", "cannot be told here", "not measured yet"
PARTLY = "holds here as far as it was measured"
WHATEVER = ""  # no verdict would change the advice
BETTER = " | "  # between methods of which the better one counts
MARGIN = 0.1  # nats a token, that rules leave room for
NATS, SHARE, TIMES = "{:+.3f}", "{:.2f}", "{:.1f}"
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # 97.5 % quantiles by freedom


@dataclass(frozen=True)
class Measured:
    """A figure with its interval.

    Attributes:
        value: the figure; interval: 95 % of it.
        seeds: that stand behind it.
        form: writes one.
        needs: rows and seeds with which 0.1 nats could be told apart, in words.
    """

    value: float
    interval: Interval
    seeds: int
    form: str = NATS
    needs: str = ""

    def __str__(self) -> str:
        if math.isinf(self.interval[0]):
            return "in no seed"
        low, high = (self._written(end) for end in self.interval)
        return f"{self._written(self.value)} ({low} to {high})"

    def _written(self, value: float) -> str:
        return "never" if math.isinf(value) else self.form.format(value)


@dataclass(frozen=True)
class Prediction:
    """What a rule says of one figure: it lies between `low` and `high`.

    Attributes:
        says: in words.
        results: folder below benchmarks/results.
        measure: finds the figure in it; None where it is not there.
        low, high: the range.
    """

    says: str
    results: str
    measure: Callable[[Path], Measured | None]
    low: float = -math.inf
    high: float = math.inf

    def measured(self) -> Measured | None:
        """The figure, if its result is kept."""
        return _measured(self.measure, RESULTS / self.results)

    def verdict(self) -> str:
        """Whether the interval lies in the range."""
        found = self.measured()
        if found is None:
            return UNMEASURED
        low, high = found.interval
        if self.low <= low and high <= self.high:
            return HOLDS if found.seeds > 1 else OPEN  # one seed is one trained set of weights
        return NOT if (high < self.low or low > self.high) and found.seeds > 1 else OPEN


@dataclass(frozen=True)
class Rule:
    """A rule of the field.

    Attributes:
        id: name of its configuration in examples/rules.
        title: the rule as it is handed on.
        source: where it comes from.
        predictions: what it says; all have to hold.
        key: setting of `advise` that it bears on.
        advice: what `advise` makes of it.
        unless: the verdict with which that would have to be thought over.
    """

    id: str
    title: str
    source: str
    predictions: tuple[Prediction, ...]
    key: str
    advice: str
    unless: str

    def verdict(self) -> str:
        """Of all predictions together."""
        found = [prediction.verdict() for prediction in self.predictions]
        if NOT in found:
            return NOT
        if set(found) <= {HOLDS, UNMEASURED}:
            return found[0] if len(set(found)) == 1 else PARTLY
        return OPEN


# ---------------------------------------------------------------------------------------------------- what is measured


def loss(a: str, b: str, beside: str = "") -> Callable[[Path], Measured | None]:
    """The evaluation loss of one method minus that of another, in nats a token: paired over rows and seeds.

    Of several names, with a bar between them, the one with the lowest loss counts.
    With `beside`, the other one stands in that folder, of a comparison that was judged on the same rows.
    """

    def find(folder: Path) -> Measured | None:
        comparison = _comparison(folder)
        runs = [run for run in comparison.runs if run.label in a.split(BETTER) or not beside]
        if beside:
            if not (RESULTS / beside).is_dir():
                return None
            other = _comparison(RESULTS / beside)
            assert other.data["fingerprint"] == comparison.data["fingerprint"]
            runs += [run.model_copy(update={"label": f"{b} beside"}) for run in other.runs if run.label == b]
        best = _better(runs, a)
        found = _difference(runs, best, f"{b} beside" if beside else b)
        return found if found is None or beside else replace(found, needs=_needed(comparison, best, b))

    return find


def _better(runs: Sequence[Run], names: str) -> str:
    """Of several methods that are named, the one with the lowest loss."""
    there = {run.label for run in runs if run.best is not None} & {*names.split(BETTER)}
    mean = {
        label: statistics.fmean(run.best.loss for run in runs if run.label == label and run.best) for label in there
    }
    return min(mean, key=mean.__getitem__, default=names)


def _difference(runs: Sequence[Run], a: str, b: str) -> Measured | None:
    sheets = sheets_of(runs, "loss")
    if sheets is None or not {a, b} <= sheets.values.keys() or not (seeds := sheets.common(a, b)):
        return None
    pair = {label: sheets.values[label] for label in (a, b)}
    (found,) = differences(Sheets(pair, {label: sheets.seeds[label] for label in pair}, sheets.weights), 0.05)
    return Measured(found.value, found.interval, len(seeds))


def _needed(comparison: Comparison, a: str, b: str) -> str:
    spread = spread_of(comparison, [(a, b)])
    if spread is None or spread.seeds is None:  # of one seed nobody knows how far others are
        return ""
    need = cheapest(needs(spread, MARGIN)) or with_more_seeds(spread, MARGIN)
    return f"{need.rows:,} evaluation rows and {need.seeds} seeds"


def figure(a: str, b: str, of: Callable[[Run], float | None]) -> Callable[[Path], Measured | None]:
    """A figure of a run of one method minus that of another: paired over seeds, with Student's interval."""

    def find(folder: Path) -> Measured | None:
        pairs = [(of(x), of(y)) for x, y in _pairs(folder, a, b)]
        return _student([x - y for x, y in pairs if x is not None and y is not None], NATS)

    return find


def share_of_steps(a: str, b: str) -> Callable[[Path], Measured | None]:
    """The share of the steps after which one method is at the last validation loss of another.

    Of several names, with a bar between them, the one with the lowest evaluation loss counts.
    """

    def find(folder: Path) -> Measured | None:
        shares = []
        for x, y in _pairs(folder, _better(_comparison(folder).runs, a), b):
            if x.eval_curve and y.eval_curve:
                steps, last = y.eval_curve[-1]
                reached = [step for step, value in x.eval_curve if value <= last]
                shares.append(min(reached) / steps if reached and not math.isnan(last) else math.inf)
        return _student(shares, SHARE)

    return find


def ratio_of_rates(a: str, b: str) -> Callable[[Path], Measured | None]:
    """The rate that was found for one method over that of another, each known up to half a step of its search.

    A search is made with one seed. Those of further seeds stand in folders beside, with `_seedN` behind the name.
    """

    def find(folder: Path) -> Measured | None:
        ratios, factor = [], 1.0
        for place in [folder, *sorted(folder.parent.glob(f"{folder.name}_seed*"))]:
            comparison = _comparison(place)
            chosen = {search.label: search.chosen for search in comparison.searches if search.auto and search.chosen}
            if {a, b} <= chosen.keys():
                ratios.append((chosen[a] or 0) / (chosen[b] or 1))
                factor = comparison.config["search"]["factor"]
        if not ratios:
            return None
        middle = statistics.geometric_mean(ratios)
        return Measured(middle, (min(ratios) / factor, max(ratios) * factor), len(ratios), TIMES)

    return find


def energy(k: int) -> Callable[[Path], Measured | None]:
    """The share of an update's squared norm in its first k singular values, in the median matrix of each seed."""

    def find(folder: Path) -> Measured | None:
        shares = []
        for file in sorted(folder.glob("analysis*.json")):
            (report,) = json.loads(file.read_text(encoding="utf-8")).values()
            each = [sum(v**2 for v in s["singular_values"][:k]) / s["norm"] ** 2 for s in report["spectra"]]
            shares.append(statistics.median(each))
        return _student(shares, SHARE)

    return find


def _pairs(folder: Path, a: str, b: str) -> list[tuple[Run, Run]]:
    """Finished runs of two methods with the same seed."""
    mine, theirs = ({run.seed: run for run in _comparison(folder).runs_of(label)} for label in (a, b))
    return [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]


def _student(values: Sequence[float], form: str) -> Measured | None:
    if not values:
        return None
    if any(map(math.isinf, values)) or len(values) == 1:
        return Measured(statistics.fmean(values), (min(values), max(values)), len(values), form)
    half = _STUDENT[min(7, len(values) - 1)] * statistics.stdev(values) / math.sqrt(len(values))
    middle = statistics.fmean(values)
    return Measured(middle, (middle - half, middle + half), len(values), form)


@cache
def _measured(measure: Callable[[Path], Measured | None], folder: Path) -> Measured | None:
    return measure(folder) if folder.is_dir() else None


@cache
def _comparison(folder: Path) -> Comparison:
    return load(folder)


# ---------------------------------------------------------------------------------------------------------- the rules

NINE, RANK_8, CLASSIC = "compare_smollm2", "rules/rank_8_is_enough", "compare_gsm8k_small"
SCORED = "_scored"  # behind the name of a result: the same adapters, whose answers were scored
PLUS = "LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv 2402.12354"
LESS = "LoRA Learns Less and Forgets Less, arXiv 2405.09673"
LORA = "LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685"
REGRET = "LoRA Without Regret, Thinking Machines Lab 2025, doi 10.64434/tml.20250929"
RS_256 = "rslora r=256 | rslora r=256 at 5e-4"
PLUS_BOTH, PISSA_BOTH = "lora_plus | lora_plus at 1e-3", "pissa | pissa at 5e-4"
ONE_ALPHA = "rules/rank_at_one_alpha"
LOWER, AT_MOST = (-math.inf, 0.0), (-math.inf, MARGIN)  # ranges of a difference, in nats a token


def _rule(
    id: str,
    title: str,
    source: str,
    key: str,
    advice: str,
    *predictions: tuple[Any, ...],
    beside: Sequence[Prediction] = (),
    unless: str = HOLDS,
) -> Rule:
    made = tuple(Prediction(says, f"rules/{id}", measure, *span) for says, measure, *span in predictions)
    return Rule(id, title, source, (*beside, *made), key, advice, unless)


RULES = (
    _rule(
        "lora_plus", "LoRA+ learns twice as fast", PLUS,
        "method.name", "LoRA stays the method to begin with.",
        ("LoRA+ ends lower than LoRA, at the better of two rates", loss(PLUS_BOTH, "lora"), *LOWER),
        ("at the better of two rates LoRA+ is at LoRA's last validation loss by half of the steps",
         share_of_steps(PLUS_BOTH, "lora"), 0.0, 0.5),
        beside=(
            Prediction("LoRA+ ends lower than LoRA, each at the rate that a search found", NINE,
                       loss("lora_plus", "lora r=8"), *LOWER),
            Prediction("LoRA+ is at LoRA's last validation loss by half of the steps", NINE,
                       share_of_steps("lora_plus", "lora r=8"), 0.0, 0.5),
            Prediction("on word problems LoRA+ ends lower than LoRA, with one rate for both", CLASSIC,
                       loss("lora_plus r=8", "lora r=8"), *LOWER),
        ),
    ),
    _rule(
        "alpha_twice_the_rank", "alpha is twice the rank", f"{LESS}; tuning it is about tuning the rate, says {LORA}",
        "method.alpha", "Alpha is fixed, and the rate is what is tuned: the two are one knob.",
        ("alpha = 2 r ends lower than alpha = 8 r at the same rate", loss("lora", "alpha = 8 r"), *LOWER),
        ("and no rate undoes it: alpha = 8 r at a quarter of the rate ends more than 0.1 nats above",
         loss("alpha = 8 r at a quarter of the rate", "lora"), 0.1, math.inf),
        beside=(
            Prediction("with it, the rate of rank 8 suits rank 32, which ends at most 0.1 nats above", RANK_8,
                       loss("lora r=32", "lora"), *AT_MOST),
        ),
    ),
    _rule(
        "rank_at_one_alpha", "Rank 8 is enough", f"{LORA}, section 7.2",
        "method.r", "Few rows begin with rank 8.",
        ("rank 8 ends at most 0.1 nats above rank 32, with the same alpha", loss("lora", "lora r=32"), *AT_MOST),
        unless=NOT,
        beside=(
            Prediction("rank 8 ends at most 0.1 nats above rank 16, each at the rate that a search found", NINE,
                       loss("lora r=8", "lora r=16"), *AT_MOST),
        ),
    ),
    _rule(
        "query_and_value", "Query and value suffice", LORA,
        "method.targets", "All linear layers are adapted.",
        ("q and v end at most 0.1 nats above all linear layers with as many parameters", loss("q and v r=42", "lora"),
         *AT_MOST),
    ),
    _rule(
        "query_and_value", "All linear layers are needed, even at as many parameters",
        f"QLoRA, arXiv 2305.14314; {REGRET}",
        "method.targets", "All linear layers are adapted.",
        ("all linear layers end lower than q and v with as many parameters", loss("lora", "q and v r=42"), *LOWER),
        unless=NOT,
    ),
    _rule(
        "pissa_converges_faster", "PiSSA converges faster",
        "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models, arXiv 2404.02948",
        "method.name", "LoRA stays the method to begin with.",
        ("PiSSA ends lower than LoRA", loss(PISSA_BOTH, "lora"), *LOWER),
        ("PiSSA is at LoRA's last validation loss before the last step", share_of_steps(PISSA_BOTH, "lora"), 0.0, 0.99),
        beside=(
            Prediction("on word problems PiSSA ends lower than LoRA, with one rate for both", CLASSIC,
                       loss("pissa", "lora r=8"), *LOWER),
        ),
    ),
    _rule(
        "rslora_for_large_ranks", "rsLoRA for large ranks",
        "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv 2312.03732",
        "method.alpha", "Alpha / r stays, as the rate that suits it hardly depends on the rank.",
        ("rsLoRA of rank 256 ends lower than LoRA of rank 256", loss(RS_256, "lora r=256"), *LOWER),
        ("rsLoRA of rank 256 ends lower than LoRA of rank 8", loss(RS_256, "lora"), *LOWER),
        beside=(
            Prediction("on word problems rsLoRA of rank 512 ends lower than LoRA of rank 512, with one rate for both",
                       CLASSIC, loss("rslora r=512", "lora r=512"), *LOWER),
            Prediction("and lower than rsLoRA of rank 8, with that rate", CLASSIC,
                       loss("rslora r=512", "rslora r=8"), *LOWER),
        ),
    ),
    _rule(
        "ten_times_the_rate", "LoRA wants ten times the rate of full tuning", f"{REGRET}; fifteen times in short runs",
        "training.lr", "Ten times, and fifteen in runs of less than 100 steps.",
        ("LoRA's best rate is 3 to 30 times that of full tuning", ratio_of_rates("lora", "full"), 3.0, 30.0),
        unless=NOT,
    ),
    _rule(
        "dora_at_small_ranks", "DoRA is robust against small ranks",
        "DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353, section 5.5",
        "method.name", "LoRA stays the method to begin with.",
        ("DoRA of rank 2 ends lower than LoRA of rank 2", loss("dora r=2", "lora r=2"), *LOWER),
        ("DoRA of rank 2 ends at most 0.1 nats above LoRA of rank 8", loss("dora r=2", "lora"), *AT_MOST),
    ),
    _rule(
        "lora_forgets_less", "LoRA forgets less than full tuning", LESS,
        "method.name", "LoRA, also where full tuning fits.",
        ("the loss on general English rises less", figure("lora", "full", lambda run: run.forgetting), *LOWER),
        unless=NOT,
    ),
    Rule(
        "lora_forgets_less", "The first 10 to 20 singular values hold 90 % of the update",
        f"no source; it goes back to the low intrinsic rank supposed by {LORA}",
        (Prediction("the first 20 have 90 % of the squared norm of full tuning's update of the median matrix",
                    "rules/lora_forgets_less", energy(20), 0.9, 1.0),),
        "method.r", "The rank follows rows and answers, not this rule.", HOLDS,
    ),
    _rule(
        "four_bits", "4-bit costs little", "QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314",
        "quantize", "4 bits only where 16 do not fit.",
        ("LoRA on a base in four bits ends at most 0.1 nats above that on the whole one", loss("lora", "lora", RANK_8),
         *AT_MOST),
        unless=WHATEVER,
    ),
    _rule(
        "rank_on_a_harder_task", "Harder tasks need larger ranks", f"no source; {LESS}, on code and mathematics",
        "method.r", "The rank is doubled where answers are long.",
        ("rank 32 ends lower than rank 2 on products of two-digit numbers", loss("lora r=32", "lora r=2"), *LOWER),
        beside=(
            Prediction("and on sums, which are easier, rank 2 ends at most 0.1 nats above rank 32", ONE_ALPHA,
                       loss("lora r=2", "lora r=32"), *AT_MOST),
        ),
        unless=NOT,
    ),
    _rule(
        "rank_with_few_rows", "Few rows want a small rank", f"no source; {REGRET}, finds no harm in more",
        "method.r", "Few rows begin with rank 8.",
        ("rank 2 ends lower than rank 32 when 40 rows are seen four times", loss("lora r=2", "lora r=32"), *LOWER),
        beside=(
            Prediction("and with rows that are all new, rank 32 ends at most 0.1 nats above rank 2", ONE_ALPHA,
                       loss("lora r=32", "lora r=2"), *AT_MOST),
        ),
        unless=WHATEVER,
    ),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the page


def page() -> str:
    """Write docs/rules.md."""
    told = [rule for rule in RULES if rule.verdict() != UNMEASURED]
    lines = [_HEAD.replace("{power}", _power()), "| rule | here | what `advise` says |", "|---|---|---|"]
    lines += [f"| [{r.title}](#{_anchor(r.title)}) | {r.verdict()} | `{r.key}`: {r.advice} |" for r in RULES]
    lines.append(f"\n{len(told)} of {len(RULES)} have a result so far.")
    lines += ["", "![Differences with their intervals, and what the rules say](rules.svg)", "", _CAPTION, *_once()]
    lines += _classic()
    for rule in RULES:
        lines += ["", *_section(rule)]
    return "\n".join(lines) + "\n"


def evidence() -> list[dict[str, Any]]:
    """What `advise` cites: each rule of which something was measured, with its verdict and figures.

    Raises:
        SystemExit: a verdict has turned, and what `advise` says was chosen for another one.
    """
    found = []
    for rule in RULES:
        if rule.unless and rule.verdict() == rule.unless:
            raise SystemExit(
                f"{rule.title!r} {rule.verdict()} now, and `advise` says of {rule.key}: {rule.advice} Think it over in "
                "compare/advice.py, then write in scripts/rules.py what it says, and which verdict would turn it."
            )
        figures = {p.says: str(p.measured()) for p in rule.predictions if p.measured() is not None}
        if figures:
            results = [p.results for p in rule.predictions if p.measured() is not None]
            model = _comparison(RESULTS / results[0]).model
            found.append({
                "key": rule.key, "rule": rule.title, "verdict": rule.verdict(), "figures": figures,
                "model": model["name"], "parameters": model["parameters"],
                "source": f"docs/rules.md#{_anchor(rule.title)}",
            })  # fmt: skip
    return found


def picture() -> str:
    """Draw all differences in nats with their intervals and the ranges that the rules say; docs/rules.svg."""
    rows: list[tuple[str, Prediction, Measured]] = []
    for rule in RULES:
        drawn = [(p, m) for p in rule.predictions if (m := p.measured()) is not None and m.form == NATS]
        rows += [(rule.title if i == 0 else "", p, m) for i, (p, m) in enumerate(drawn)]
    x = Axis("first minus second, nats/token", -_WIDEST, _WIDEST, form="{:+g}".format)
    y = Axis("", len(rows) - 0.5, -0.5)
    names = [name if len(name) <= _NAME else name[: _NAME - 1] + "…" for name, _, _ in rows]
    plot = Plot("What the rules say and what was measured", x, y, y_names=names, size=(860.0, 66 + 22.0 * len(rows)))
    for i, (_, p, m) in enumerate(rows):
        low, high = map(x.clamped, (p.low, p.high))
        plot.band([(low, i - 0.4), (high, i - 0.4)], [(low, i + 0.4), (high, i + 0.4)], "said")
        if not x.within(m.value):
            plot.beyond((m.value, i), str(m), "far")
            continue
        css = {HOLDS: "holds", NOT: "not"}.get(p.verdict(), "open")
        plot.line([(x.clamped(end), i) for end in m.interval], f"bar {css}", f"{p.says}: {m}")
        plot.dot((m.value, i), f"dot {css}", f"{p.says}: {m}", 0, 4)
    plot.upright(0.0, "zero")
    plot.root.set("xmlns", "http://www.w3.org/2000/svg")
    return plot.to_html().replace(">", f"><style>{_STYLE}</style>", 1) + "\n"


def _section(rule: Rule) -> list[str]:
    lines = [f"## {rule.title}", "", f"From: {rule.source}.", ""]
    lines += ["| the rule says | measured | verdict | where |", "|---|---|---|---|"]
    shown, needed = {}, []
    for prediction in rule.predictions:
        found = prediction.measured()
        where = _where(prediction.results) if found else "–"
        lines.append(f"| {prediction.says} | {found or '–'} | {prediction.verdict()} | {where} |")
        if found:
            shown[prediction.results] = f"{_seeds(found)}, {_conditions(_comparison(RESULTS / prediction.results))}"
            needed += [found.needs] if found.needs and prediction.verdict() == OPEN else []
    lines += ["", f"**{rule.verdict()[0].upper()}{rule.verdict()[1:]}.** `advise`: {rule.advice}"]
    if needed:
        lines.append(f"To tell {MARGIN} nats apart here takes about {' or '.join(dict.fromkeys(needed))}.")
    lines += [f"\n{results}: {text}." for results, text in shown.items()]
    missing = {prediction.results for prediction in rule.predictions if prediction.measured() is None}
    lines += [f"\nStill to be measured: `adapterlab compare examples/{name}.yaml`" for name in sorted(missing)]
    own = f"rules/{rule.id}"
    drawn = own if own in shown else next(iter(shown), None)
    if drawn:
        lines.append(f"\n![Losses of {drawn}](../benchmarks/results/{drawn}/loss_curves.png)")
    return lines


def _where(results: str) -> str:
    folder = f"../benchmarks/results/{results}"
    return f"[{results}]({folder}/table.md), [JSON]({folder}/comparison.json)"


def _seeds(found: Measured) -> str:
    return f"{found.seeds} seed{'s' if found.seeds > 1 else ''}"


def _conditions(comparison: Comparison) -> str:
    """What a figure was measured on, and how long it took."""
    told, data = comparison.conditions, comparison.data
    # Runs that shared a base have all waited for the same passes.
    seconds = sum(run.own_seconds or 0.0 for run in comparison.runs)
    return (
        f"{comparison.model['name']} in {comparison.model['precision']}, {data['source']}, {told['budget']} of "
        f"{told['rows in a step']} rows, {data['eval_rows']} evaluation rows, about {seconds / 60:.0f} minutes of "
        "processes"
    )


def _power() -> str:
    """How many rows a pair of methods needs, as far as such comparisons spread."""
    (points,), (nats,) = (
        needs(TYPICAL[judge], size, seeds=(2,)) for judge, size in (("score", 0.05), ("loss", MARGIN))
    )
    return textwrap.fill(
        f"**What it takes to tell.** Where methods spread as the nine of {NINE} do, two that differ by five points "
        f"of right answers are told apart, in four of five comparisons, with about {points.rows:,} evaluation rows and "
        f"two seeds; two that differ by {MARGIN} nats a token with about {nats.rows:,}. Here there are 100, which is "
        "why the loss judges. `adapterlab compare --power` says the same of your comparison before anything runs.",
        120, break_on_hyphens=False,
    )  # fmt: skip


def _once() -> list[str]:
    """Say which results share runs, made once or again with the same seed: their verdicts are not independent."""
    found: dict[tuple[Any, ...], list[str]] = {}
    names = sorted({p.results for rule in RULES for p in rule.predictions if p.measured() is not None})
    for name in names:
        for run in _comparison(RESULTS / name).runs:
            if run.best is not None and run.label != UNTRAINED:
                made = (run.label, run.seed, *run.best.losses)
                found.setdefault(made, []).append(Path(name).name)
    shared = sorted({tuple(places) for places in found.values() if len(places) > 1})
    if not shared:
        return []
    places = "; ".join(", ".join(each) for each in shared)
    return ["", f"Equal runs, to the last bit, stand in several results, so that these hang together: {places}."]


# ---------------------------------------------------------------------------------------------------- the classic table

_PUBLISHED = {
    "lora r=8": 0.3769, "lora_plus r=8": 0.3839, "rslora r=8": 0.3761,
    "lora r=16": 0.3752, "lora_plus r=16": 0.3695, "rslora r=16": 0.3809,
    "lora r=512": 0.4358, "lora_plus r=512": 0.6344, "rslora r=512": 1.34,
}  # fmt: skip


def _classic() -> list[str]:
    """The table of ranks on grade-school word problems: with one rate for all, and with the rate that suits each."""
    tables = [(name, RESULTS / name) for name in (CLASSIC, f"{CLASSIC}_searched") if (RESULTS / name).is_dir()]
    if not tables:
        return []
    lines = ["", "## The classic table", "", _CLASSIC_HEAD]
    for name, folder in tables:
        comparison, scored = _comparison(folder), RESULTS / f"{name}{SCORED}"
        answers = _comparison(scored) if scored.is_dir() else None
        searched = {search.label: search.chosen for search in comparison.searches if search.auto}
        lines += ["", f"**{'With the rate that a search found for each' if searched else 'With one rate for all'}** "
                  f"({_where(name)}; {_trained(comparison)}, {_conditions(comparison)}):", ""]  # fmt: skip
        columns = _columns(comparison, searched, answers)
        lines += [f"| {' | '.join(columns)} |", f"|---{'|---:' * (len(columns) - 1)}|"]
        for standing in comparison.standings:
            lines.append(f"| {' | '.join(cell(standing.label) for cell in columns.values())} |")
        found = {m: _difference(comparison.runs, f"{m} r=512", f"{m} r=8") for m in ("lora", "lora_plus", "rslora")}
        large = ", ".join(f"{method} {apart}" for method, apart in found.items() if apart)
        if answers:
            lines.append(f"\nRight answers are those of the same adapters ({_trained(answers)}) on "
                         f"{answers.data['eval_rows']} problems, examined by themselves "
                         f"({_where(scored.name)}).")  # fmt: skip
        lines += [f"\nRank 512 minus rank 8, where the published ones collapse: {large}."] if large else []
        lines.append(f"\n![Losses of {name}](../benchmarks/results/{name}/loss_curves.png)")
    return lines


def _columns(
    comparison: Comparison, searched: dict[str, float | None], answers: Comparison | None
) -> dict[str, Callable[[str], str]]:
    """What stands in the columns of a classic table, by their titles: a function of a method's label."""
    base = "lora r=8"

    def mean(label: str, figure: Callable[[Run], float | None], form: str) -> str:
        value = comparison.mean(label, figure)
        return "–" if value is None else f"{value:{form}}"

    def apart(label: str) -> str:
        found = None if label in (base, UNTRAINED) else _difference(comparison.runs, label, base)
        return str(found or "–")

    def rate(label: str) -> str:
        return f"{searched[label]:.2g}" if searched.get(label) else "–"

    return {
        "method": str,
        **({"rate": rate} if searched else {}),
        "loss on the problems": lambda label: mean(label, lambda run: run.best and run.best.loss, ".4f"),
        "minus LoRA of rank 8": apart,
        **(_answers(answers) if answers else {}),
        "forgetting": lambda label: mean(label, lambda run: run.forgetting, "+.3f"),
        "published, Qwen2.5-1.5B": lambda label: str(_PUBLISHED.get(label, "–")),
    }


def _answers(scored: Comparison) -> dict[str, Callable[[str], str]]:
    """Columns of the shares of right answers with their intervals."""
    rows = {row.label: row for row in table.build([scored])}
    return {
        "right answers, best step": lambda label: str(rows[label].cells["score_best"]),
        "at the end": lambda label: str(rows[label].cells["score_final"]),
    }


def _trained(comparison: Comparison) -> str:
    """How many seeds of each method have finished."""
    counts = {standing.finished for standing in comparison.standings if standing.label != UNTRAINED}
    return f"{min(counts)} to {max(counts)} seeds" if len(counts) > 1 else f"seeds of each: {max(counts, default=0)}"


def _anchor(title: str) -> str:
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


_WIDEST, _NAME = 1.0, 46  # ends of the picture's axis, in nats; letters of a rule's name in it
_CAPTION = (
    "All differences in nats, with their 95 % intervals. Blue is where the rule says that they lie; green: it holds "
    "here; red: it does not; grey: it cannot be told."
)
_STYLE = (
    "svg{font:13px system-ui,sans-serif;background:#fff}text{fill:#222}.end{text-anchor:end}.middle{text-anchor:middle}"
    ".grid{stroke:#ddd}.zero{stroke:#555}.said{fill:#cfe3f5}.bar{stroke-width:3;fill:none}.bar.holds{stroke:#1a7f37}"
    ".bar.not{stroke:#cf222e}.bar.open{stroke:#7d8590}.dot.holds{fill:#1a7f37}.dot.not{fill:#cf222e}.dot.open{fill:#7d8590}"
    ".far{fill:#cf222e}"
)
_CLASSIC_HEAD = """LoRA, LoRA+ and rsLoRA at three ranks, DoRA, PiSSA and full tuning on grade-school word problems
(GSM8K): a table that is handed around for Qwen2.5-1.5B with one learning rate for all, where large ranks collapse. Here
it is in little ([compare_gsm8k_small.yaml](../examples/compare_gsm8k_small.yaml), and with searched rates
[compare_gsm8k_small_searched.yaml](../examples/compare_gsm8k_small_searched.yaml)), 30 steps of two short rows, so that
only what differs by much can be told apart. Memory, times and steps of every method stand in the linked table. A model
of 135M parameters solves next to none of these problems, whatever it was trained with: the loss judges, and right
answers stand beside it."""

_HEAD = """# The field's rules, measured

Texts on fine-tuning hand on rules that are rarely measured. Here each is a small comparison. Its configuration in
[examples/rules](../examples/rules) says what the rule says, where it comes from and what would count as holding; its
result is kept with every figure, and this page is generated from those results.

**How a verdict comes about.** A rule predicts in which range a figure lies. *Holds here*: the figure's 95 % interval
lies wholly in that range, for all that the rule predicts. *Does not hold here*: for something it predicts, the interval
lies wholly outside. *Cannot be told here*: neither, or there is one seed. Differences are first minus second in nats a
token of the evaluation rows, paired, with a bootstrap over rows and seeds as in [compare.md](compare.md), and are not
corrected for the number of rules. Figures of whole runs (forgetting, steps) have Student's interval over seeds, which
with two of them is wide.

{power}

**What this cannot say.** SmolLM2-135M on short rows and small budgets is one place, and 135M parameters cannot speak
for 7B: rates, ranks and what is forgotten change with size and data. A rule that does not hold here may hold there, and
the other way round: put your model and rows into the configuration, and look.

The common rate, 2e-3, is that of LoRA here: one run at 1e-3 ended at 0.72 nats where one at 2e-3 ended at 0.53, before
anything was compared at it.

**What was not fixed beforehand.** Some criteria were made sharper once first results were seen. That alpha = 2 r must
also win against a quarter of the rate, and at rank 32, was added then: by its first line alone, one rate for both, that
rule holds. An arm of rank 32 at alpha 64 was taken out of "Rank 8 is enough" as a matter of its rate; it would have
spoken for the rule. Read such verdicts as a reason to look again, with seeds of your own.
"""
