"""The report as one page that needs nothing else: styles, script and drawings are inside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from adapterlab import yaml_text
from adapterlab.compare.recommending import ONE_SEED
from adapterlab.compare.report import amounts, charts, svg, table
from adapterlab.compare.report.charts import Figure
from adapterlab.compare.report.join import alike
from adapterlab.compare.report.origins import came_about
from adapterlab.compare.report.table import COLOURS, COLUMNS, Cell, Column, Row
from adapterlab.compare.results import Comparison, Difference, Run, Sample
from adapterlab.compare.statistics import ALL_PAIRS
from adapterlab.compare.summary import references_of

_HERE = Path(__file__).parent
_MACHINE = ("device", "processor", "runs at a time", "threads of each run")  # conditions that times depend on
_QUESTIONS = 8  # shown side by side at most


@dataclass(frozen=True)
class Card:
    """What to take for one aim."""

    title: str
    row: Row
    figure: str
    more: str


@dataclass(frozen=True)
class Question:
    """One evaluation question with everybody's answers."""

    prompt: str
    reference: str
    answers: list[tuple[Row, Sample]]


@dataclass(frozen=True)
class Part:
    """What the page shows of one comparison."""

    comparison: Comparison
    facts: list[tuple[str, str]]
    cards: list[Card]
    rates: list[Figure]
    questions: list[Question]
    config: str
    conditions: list[tuple[str, str]]


@dataclass(frozen=True)
class Group:
    """Comparisons that are ranked together and drawn in the same axes.

    Attributes:
        name: of the comparison that they make.
        level: of significance.
        shown: the rows with curves.
        figures: charts with all methods.
        each: small charts with a method each.
        differences: a chart for each reference.
        pairs: all differences, written out.
    """

    name: str
    level: float
    shown: list[Row]
    figures: list[Figure]
    each: list[Figure]
    differences: list[Figure]
    pairs: list[tuple[Difference, str, str]]


def page(comparisons: Sequence[Comparison], rows: Sequence[Row] | None = None) -> str:
    """Write one or more comparisons as a self-contained page.

    Args:
        comparisons: at least one, with different names.
        rows: of their table, if they are made already.
    """
    rows = table.build(comparisons) if rows is None else rows
    folders = {c.name: [row for row in rows if row.folder == c.name] for c in comparisons}
    parts = [_part(c, folders[c.name]) for c in comparisons]
    wholes = {id(row.comparison): [r for r in rows if r.comparison is row.comparison] for row in rows}
    groups = [_group(table.foremost(own)) for own in wholes.values()]
    sections = _sections(parts, groups)
    columns = table.columns(rows)
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["breakable"] = _breakable
    environment.globals.update(sample=lambda css, shape: Markup(svg.sample(css, shape)), rate=amounts.rate)
    return environment.get_template("page.html.j2").render(
        title=_title(comparisons),
        css=_css(),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
        many=len(comparisons) > 1,
        judge=" or ".join(sorted({c.judge for c in comparisons})),
        parts=parts,
        groups=groups,
        sections=sections,
        section_ids={key for key, _ in sections},
        notices=notices(comparisons),
        rows=rows,
        columns=columns,
        table_notes=[*filter(None, [table.left_out(rows)]), *came_about(comparisons)],
        tops={top for own in wholes.values() for top in _tops(own)},
        runs=[_run(run, c, columns) for c in comparisons for run in _single_runs(c, folders[c.name])],
        rank_note=_rank_note(rows),
    )


def _single_runs(comparison: Comparison, rows: Sequence[Row]) -> Iterable[Run]:
    """The runs that are listed one by one."""
    near = {row.label for row in table.foremost(rows)}
    return (run for run in comparison.runs if run.label in near)


def notices(comparisons: Sequence[Comparison]) -> list[str]:
    """Say what a reader must know before believing anything."""
    found = []
    for c in comparisons:
        left = sum(run.status in ("waiting", "running") for run in c.runs)
        if left or not c.finished:
            found.append(f"{c.name} is not finished: {left} of {len(c.runs)} runs are still to be done.")
        if c.of_one_seed:
            found.append(f"{c.name} has one seed: {ONE_SEED}")
        if references := references_of([s.label for s in c.standings if s.rank is not None]):
            found.append(
                f"{c.name} has so many methods that each is compared with {' and '.join(references)} alone. Ranks of "
                f"those that differ from them are places. Charts, answers and single runs are shown of the best "
                f"{ALL_PAIRS}; comparison.json has all."
            )
    if len(comparisons) > 1:
        if len(alike(comparisons)) > 1:
            found.append(
                "These comparisons were judged on different evaluation data, so their scores and losses cannot be "
                "ranked together. Ranks and charts hold for each evaluation set on its own."
            )
        else:
            found.append(
                "All were judged on the same evaluation rows, so the methods of all folders are ranked together."
            )
        machines = {(c.platform, *(str(c.conditions.get(key)) for key in _MACHINE)) for c in comparisons}
        if len(machines) > 1:
            found.append("Times and memory were measured under different conditions; compare them with care.")
    return found


def _breakable(text: str) -> Markup:
    """Let a long name break after an underscore."""
    return escape(text).replace("_", Markup("_<wbr>"))


def _title(comparisons: Sequence[Comparison]) -> str:
    models = list(dict.fromkeys(_named(c.model) for c in comparisons))
    data = list(dict.fromkeys(_named(c.data) for c in comparisons))
    return f"Fine-tuning {', '.join(models)} on {', '.join(data)}"


def _named(about: Mapping[str, Any]) -> str:
    return next((str(about[key]) for key in ("name", "source") if about.get(key)), "unnamed")


def _css() -> str:
    variables = " ".join(f"--c{i}: light-dark({light}, {dark});" for i, (light, dark) in enumerate(COLOURS))
    classes = " ".join(f".s{i} {{ --c: var(--c{i}); }}" for i in range(len(COLOURS)))
    return f":root {{ {variables} }}\n{classes}\n{(_HERE / 'page.css').read_text(encoding='utf-8')}"


def _part(comparison: Comparison, rows: list[Row]) -> Part:
    own = {row.label: row for row in rows}
    near = {row.label: row for row in table.foremost(rows)}
    rates = [charts.learning_rate(s, near[s.label]) for s in comparison.searches if s.auto and s.label in near]
    return Part(
        comparison=comparison,
        facts=_facts(comparison),
        cards=_cards(comparison, own),
        rates=[figure for figure in rates if figure is not None],
        questions=_questions(near.values()),
        config=yaml_text.written(_plain(comparison.config), width=100),
        conditions=_conditions(comparison),
    )


def _group(rows: Sequence[Row]) -> Group:
    whole = rows[0].comparison
    drawn = [charts.tradeoff(rows, key) for key in ("peak_memory_bytes", "train_seconds")]
    together, each = charts.losses(rows)
    form = amounts.points if whole.higher_is_better else amounts.signed
    keys = {row.key for row in rows}
    pairs = [d for d in whole.differences if d.a in keys and d.b in keys]
    return Group(
        name=whole.name,
        level=whole.level,
        shown=[row for row in rows if any(run.train_curve for run in whole.runs_of(row.key, None))],
        figures=[*(figure for figure in drawn if figure is not None), *together],
        each=each,
        differences=charts.differences(rows),
        pairs=[(d, form(d.value), " to ".join(form(end) for end in d.interval)) for d in pairs],
    )


def _sections(parts: Sequence[Part], groups: Sequence[Group]) -> list[tuple[str, str]]:
    there = {
        "advice": any(part.comparison.recommendation for part in parts),
        "charts": any(group.figures or group.each for group in groups),
        "differences": any(group.differences for group in groups),
        "rates": any(part.rates for part in parts),
        "answers": any(part.questions for part in parts),
    }
    names = {"advice": "Which one to take", "table": "Table", "charts": "Charts", "differences": "Differences",
             "rates": "Learning rates", "answers": "Answers", "configuration": "Configuration"}  # fmt: skip
    return [(key, name) for key, name in names.items() if there.get(key, True)]


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    judge = "share of right answers" if comparison.higher_is_better else "evaluation loss"
    done = sum(run.status == "finished" for run in comparison.runs)
    conditions = comparison.conditions
    facts = [("model", _named(comparison.model)), ("data", _named(comparison.data)), ("judged by", judge)]
    facts += [(key, _text(conditions[key])) for key in ("budget", "evaluation rows", "device") if key in conditions]
    left_out = max((run.best.left_out for run in comparison.runs if run.best), default=0)
    if left_out:
        facts.append(("evaluation rows too long to be asked", str(left_out)))
    return [*facts, ("runs", f"{done} of {len(comparison.runs)} finished"), ("started", _moment(comparison.started))]


def _moment(iso: str) -> str:
    return f"{iso[:16].replace('T', ' ')} UTC"


def _cards(comparison: Comparison, rows: Mapping[str, Row]) -> list[Card]:
    advice = comparison.recommendation
    if advice is None:
        return []
    judge = table.JUDGED[comparison.judge]
    title = "Best score" if comparison.higher_is_better else "Lowest evaluation loss"
    wanted = [(title, advice.best, judge), ("Least memory", advice.least_memory, "peak_memory_bytes"),
              ("Least time", advice.least_time, "train_seconds")]  # fmt: skip
    titles = {column.key: column.title for column in COLUMNS}
    cards = []
    for name, label, key in wanted:
        if label is not None and label in rows:
            row = rows[label]
            rest = [k for _, _, k in wanted if k != key and row.cells[k].value is not None]
            more = ", ".join(f"{titles[k]} {row.cells[k].text}" for k in rest)
            if key == judge and advice.undecided:
                more = "; ".join(filter(None, [more, f"cannot be told apart from {', '.join(advice.undecided)}"]))
            cards.append(Card(name, row, str(row.cells[key]), more))
    return cards


def _questions(rows: Iterable[Row]) -> list[Question]:
    found: dict[int, Question] = {}
    for row in rows:
        exam = next((run.best for run in row.runs if run.best is not None), None)
        for sample in exam.samples if exam is not None else []:
            question = found.setdefault(sample.row, Question(sample.prompt, sample.reference, []))
            question.answers.append((row, sample))
    return [found[number] for number in sorted(found)[:_QUESTIONS]]


def _conditions(comparison: Comparison) -> list[tuple[str, str]]:
    about = {f"model: {k}": v for k, v in comparison.model.items()}
    about |= {f"data: {k}": v for k, v in comparison.data.items()}
    about |= comparison.conditions
    about |= {"versions": ", ".join(f"{k} {v}" for k, v in comparison.versions.items()),
              "platform": comparison.platform, "commit": comparison.git, "started": _moment(comparison.started),
              "updated": _moment(comparison.updated)}  # fmt: skip
    return [(key, _text(value)) for key, value in about.items() if value not in (None, "")]


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(v) for v in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _tops(rows: Sequence[Row]) -> set[tuple[str, str]]:
    """Find the best cells of each column among what was trained; a value that all share is no best."""
    trained = [row for row in rows if row.series is not None]
    tops = set()
    for column in COLUMNS:
        values = [v for row in trained if (v := row.cells[column.key].value) is not None]
        if column.best and len(set(values)) > 1:
            best = max(values) if column.best == "high" else min(values)
            tops |= {(row.name, column.key) for row in trained if row.cells[column.key].value == best}
    return tops


def _run(run: Run, comparison: Comparison, columns: Iterable[Column]) -> tuple[str, Run, list[Cell]]:
    return comparison.name, run, [table.cell([run], column) for column in columns]


def _rank_note(rows: Sequence[Row]) -> str:
    tied = [row for row in rows if row.standing is not None and row.standing.tied]
    if not tied:
        return ""
    level = ", ".join(sorted({f"{row.comparison.level:g}" for row in tied}))
    return (
        "Methods that share a rank (=) cannot be told apart: paired bootstrap over evaluation rows and seeds, "
        f"corrected by Holm, level {level}."
    )
