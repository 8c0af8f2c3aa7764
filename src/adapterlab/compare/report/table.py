"""The table: one row for each method with its settings, means over its seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from adapterlab.compare.recommending import listed
from adapterlab.compare.report import amounts
from adapterlab.compare.report.join import alike, exam_interval, join, joined_label
from adapterlab.compare.results import UNTRAINED, Comparison, Interval, Run, Standing, mean
from adapterlab.compare.statistics import ALL_PAIRS
from adapterlab.terminal import shown

COLOURS = (  # on light and on dark ground
    ("#2468b0", "#6fb1f0"),
    ("#c4521d", "#ff9d68"),
    ("#23834e", "#62c98d"),
    ("#b02f66", "#f384ae"),
    ("#7149c2", "#b79bf5"),
    ("#86690f", "#dcba58"),
    ("#0b7f89", "#4fc7d1"),
    ("#bd3333", "#ff8a84"),
    ("#51691d", "#adc96d"),
    ("#a74a9b", "#e8a5de"),
    ("#274a80", "#9fbbe9"),
    ("#7d4b32", "#d6a98d"),
)
Kind = Literal["classic", "more"]


@dataclass(frozen=True)
class Column:
    """A measured quantity.

    Attributes:
        key: name in CSV files, with the unit.
        title: what people read.
        figure: finds it in a run.
        form: writes it.
        kind: "classic" stands in the short table, "more" in the whole one only.
        best: which end is the better one; "" where neither is.
        note: what it means, in a sentence.
    """

    key: str
    title: str
    figure: Callable[[Run], float | None]
    form: Callable[[float], str]
    kind: Kind
    best: Literal["high", "low", ""]
    note: str


@dataclass(frozen=True)
class Cell:
    """One figure of one row; `interval` is the 95 % interval where there is one."""

    value: float | None
    text: str
    interval: Interval | None = None
    interval_text: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.interval_text})" if self.interval_text else self.text


@dataclass(frozen=True)
class Row:
    """One method with its settings, in one comparison.

    Attributes:
        comparison: it is ranked in: its own, or several joined.
        key: its label there.
        folder: name of its own comparison.
        label: in its own comparison.
        name: the label, with the folder in front when there are several.
        series: number of its colour and mark; None for the untrained model.
        standing: its rank and value.
        cells: by column key.
        lr: that its runs were trained with.
        remark: what a reader must know: failed, unfinished, some seeds missing; else "".
    """

    comparison: Comparison
    key: str
    folder: str
    label: str
    name: str
    series: int | None
    standing: Standing | None
    cells: dict[str, Cell]
    lr: float | None
    remark: str

    @property
    def css(self) -> str:
        """Classes of its drawings: colour, and a name to be found by."""
        return "base" if self.series is None else f"s{self.series % len(COLOURS)} k{self.series}"

    @property
    def colour(self) -> str:
        """Its colour on light ground."""
        return "#55606d" if self.series is None else COLOURS[self.series % len(COLOURS)][0]

    @property
    def shape(self) -> int:
        """Number of its mark."""
        return 0 if self.series is None else self.series + self.series // len(COLOURS)

    @property
    def rank(self) -> int | None:
        """Rank within its comparison."""
        return None if self.standing is None else self.standing.rank

    @property
    def runs(self) -> list[Run]:
        """Finished runs."""
        return self.comparison.runs_of(self.key)


COLUMNS: tuple[Column, ...] = (
    Column("score_best", "score, best", lambda r: r.best.score if r.best else None, amounts.percent, "classic", "high",
           "Share of right answers at the checkpoint with the lowest validation loss, with a 95 % interval."),
    Column("score_final", "score, final", lambda r: r.final.score if r.final else None, amounts.percent, "classic",
           "high", "Share of right answers after the last step, with a 95 % interval."),
    Column("loss_best_nats", "loss, best", lambda r: r.best.loss if r.best else None, amounts.loss, "classic", "low",
           "Mean loss of the labelled tokens of the evaluation rows at the same checkpoint, in nats a token, with a "
           "95 % interval."),
    Column("loss_final_nats", "loss, final", lambda r: r.final.loss if r.final else None, amounts.loss, "more", "low",
           "The same after the last step."),
    Column("best_validation_loss_nats", "validation loss", lambda r: None if r.is_untrained else r.best_loss,
           amounts.loss, "classic", "low",
           "Lowest mean loss of the validation rows, which are set apart from the training rows to choose the "
           "checkpoint by; the evaluation rows are others."),
    Column("best_step", "best step", lambda r: r.best_step, amounts.count, "classic", "",
           "Step of the lowest validation loss."),
    Column("final_train_loss_nats", "train loss", lambda r: r.train_loss, amounts.loss, "classic", "low",
           "Mean loss of the last ten training steps, in nats a token, on rows that are trained on: far below the "
           "other losses means learnt by heart."),
    Column("peak_memory_bytes", "peak memory", lambda r: r.peak_memory, amounts.size, "classic", "low",
           "Largest memory of the training process; of the GPU's allocator where there is a GPU."),
    Column("mean_memory_bytes", "mean memory", lambda r: r.memory.mean if r.memory else None, amounts.size, "classic",
           "low", "Mean resident memory of the training process over the steps."),
    Column("train_seconds", "training time", lambda r: r.train_seconds, amounts.time, "classic", "low",
           "Time in training steps alone, without loading and measuring."),
    Column("trainable_parameters", "trainable", lambda r: r.trainable, amounts.count, "more", "low",
           "Number of trainable parameters."),
    Column("trainable_share", "share", lambda r: r.share, amounts.share, "more", "low",
           "Trainable share of all parameters."),
    Column("step_seconds", "step time", lambda r: r.step_seconds, amounts.time, "more", "low",
           "Mean time of a training step."),
    Column("tokens_per_second", "tokens/s", lambda r: r.tokens_per_second, amounts.count, "more", "high",
           "Trained input tokens a second, padding not counted."),
    Column("wall_seconds", "wall time", lambda r: r.wall_seconds if r.together == 1 else None, amounts.time, "more",
           "low", "From the start of the run's process to its end: loading, training and measuring, of runs that "
           "shared it with no others."),
    Column("forgetting_nats", "forgetting", lambda r: r.forgetting, amounts.signed, "more", "low",
           "Change of the mean token loss on general English text against the untrained model; above 0 is worse."),
    Column("adapter_bytes", "adapter size", lambda r: r.adapter_bytes, amounts.size, "more", "low",
           "Size of the adapter's folder on disk."),
    Column("inference_unmerged", "inference, unmerged", lambda r: r.inference.unmerged if r.inference else None,
           amounts.factor, "more", "low",
           "Time of a forward pass with the adapter beside the weights; the plain base model takes 1."),
    Column("inference_merged", "inference, merged", lambda r: r.inference.merged if r.inference else None,
           amounts.factor, "more", "low",
           "The same with the adapter written into the weights; empty where that cannot be done."),
    Column("training_flops", "FLOPs", lambda r: r.flops, amounts.short, "more", "low",
           "Floating point operations of the whole training."),
)  # fmt: skip
_CLASSIC = (  # the order in which the classic table is usually given
    "peak_memory_bytes", "mean_memory_bytes", "best_step", "best_validation_loss_nats", "final_train_loss_nats",
    "train_seconds", "loss_best_nats", "score_best", "score_final",
)  # fmt: skip
_COSTS = ("peak_memory_bytes", "mean_memory_bytes", "train_seconds")  # of the classic table
_SCORES = ("score_best", "score_final")
_EXAMS = {  # columns with an interval: which exam, and what of it
    "score_best": ("best", "score"), "score_final": ("final", "score"),
    "loss_best_nats": ("best", "loss"), "loss_final_nats": ("final", "loss"),
}  # fmt: skip
JUDGED = {"score": "score_best", "loss": "loss_best_nats"}  # by the judge: the column that ranks


def build(comparisons: Sequence[Comparison]) -> list[Row]:
    """Make the rows of one or more comparisons.

    Those that were judged on the same rows are ranked together. Within each group rows stand by rank, then what has
    none.
    """
    rows: list[Row] = []
    for members in alike(comparisons):
        whole = join(members)
        places = {standing.label: standing for standing in whole.standings}
        order = {key: i for i, key in enumerate(places)}
        own = [(c, label) for c in members for label in c.labels]
        trained = [(c.name, label) for c, label in own if label != UNTRAINED]
        series = {place: len(rows) + i for i, place in enumerate(trained)}
        found = []
        for c, label in own:
            key = label if len(members) == 1 else joined_label(c, label)
            name = label if len(comparisons) == 1 else joined_label(c, label)
            found.append(_row(whole, key, (c.name, label, name), series.get((c.name, label)), places.get(key)))
        rows += sorted(found, key=lambda row: order.get(row.key, len(order)))
    return rows


def foremost(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that are shown in more than the table: all, or the best and the untrained where there are many.

    Args:
        rows: of one comparison, best first.
    """
    near = {row.name for row in [row for row in rows if row.series is not None][:ALL_PAIRS]}
    return [row for row in rows if row.series is None or row.name in near]


def columns(rows: Iterable[Row], kind: Kind | None = None) -> list[Column]:
    """Return the columns in which at least one trained row has a figure, or any row while none has been trained.

    Args:
        rows: of the table.
        kind: only those of this kind.
    """
    rows = list(rows)
    judging = [row for row in rows if row.series is not None and row.runs] or rows
    known = [c for c in COLUMNS if any(row.cells[c.key].value is not None for row in judging)]
    return [c for c in known if kind in (None, c.kind)]


def left_out(rows: Sequence[Row]) -> str:
    """Say in a line which columns of the classic table are not there, and why; "" where all are."""
    there = {column.key for column in columns(rows)}
    reasons: dict[str, list[str]] = {}
    for column in (c for c in COLUMNS if c.kind == "classic" and c.key not in there):
        reasons.setdefault(_why_empty(rows, column), []).append(f"“{column.title}”")
    if not reasons:
        return ""
    return f"Not in the table: {'; '.join(f'{listed(names)} ({why})' for why, names in reasons.items())}."


def _why_empty(rows: Sequence[Row], column: Column) -> str:
    exams = [exam for row in rows for run in row.runs if (exam := run.best) is not None]
    if column.key in _SCORES and exams and all(exam.score is None for exam in exams):
        return "answers were not scored"
    if column.key in _COSTS and all(_without_costs(row.comparison) for row in rows):
        return "costs were not measured: evaluation.costs is false"
    return "no finished run has any"


def _without_costs(comparison: Comparison) -> bool:
    evaluation = comparison.config.get("evaluation")
    return isinstance(evaluation, Mapping) and evaluation.get("costs") is False


def markdown(rows: Sequence[Row]) -> str:
    """Write the classic table, and below it all other measurements, remarks, and what is not there."""
    by_key = {column.key: column for column in columns(rows, "classic")}
    classic = [by_key[key] for key in _CLASSIC if key in by_key]
    many = len({row.folder for row in rows}) > 1
    parts = [_grid(rows, classic, rank=True, many=many)]
    if more := columns(rows, "more"):
        parts.append(_grid(rows, more, rank=False, many=many))
    remarks = "\n".join(f"- {plain(row.name)}: {plain(row.remark)}" for row in rows if row.remark)
    return "\n\n".join(filter(None, [*parts, remarks, left_out(rows)])) + "\n"


def comma_separated(rows: Sequence[Row]) -> str:
    """Write every figure in full precision, with a header; missing figures are empty, and no cell is a formula."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    intervals = [c.key for c in COLUMNS if any(row.cells[c.key].interval for row in rows)]
    header = ["comparison", "method", "rank", "seeds", "lr", *(c.key for c in COLUMNS)]
    writer.writerow([*header, *(f"{key}_{end}" for key in intervals for end in ("low", "high")), "remark"])
    for row in rows:
        first = [row.folder, row.label, row.rank, len(row.runs), row.lr]
        ends = [end for key in intervals for end in row.cells[key].interval or (None, None)]
        cells = [*first, *(row.cells[c.key].value for c in COLUMNS), *ends, row.remark]
        writer.writerow([_inert(value) for value in cells])
    return stream.getvalue()


def cell(runs: Sequence[Run], column: Column, interval: Interval | None = None) -> Cell:
    """Return the mean of a column over runs of one method, with its interval where it has one.

    Args:
        runs: finished ones.
        column: what to show.
        interval: of the mean, where it is known already; those of exams get theirs here otherwise.
    """
    value = mean(column.figure(run) for run in runs)
    if value is None:
        return Cell(None, amounts.MISSING)
    if interval is None and column.key in _EXAMS:
        which, judge = _EXAMS[column.key]
        exams = {run.seed: run.best if which == "best" else run.final for run in runs}
        found = {seed: exam for seed, exam in exams.items() if exam is not None}
        interval = exam_interval(list(found.values()), list(found), judge)
    if interval is None:
        return Cell(value, column.form(value))
    low, high = (column.form(end) for end in interval)
    unit = " %" if low.endswith(" %") else ""
    return Cell(value, column.form(value), interval, f"{low.removesuffix(unit)} – {high}")


def remark(comparison: Comparison, key: str) -> str:
    """Say what stands in the way of taking a row at face value, or nothing."""
    runs = comparison.runs_of(key, None)
    failed = [run for run in runs if run.status == "failed"]
    open_ = [run for run in runs if run.status in ("waiting", "running")]
    parts = []
    if failed:
        which = "failed" if len(failed) == len(runs) else f"{len(failed)} of {len(runs)} seeds failed"
        parts.append(f"{which}: {failed[0].reason}")
    if open_:
        parts.append(f"{len(open_)} of {len(runs)} runs not finished")
    return "; ".join(parts)


def _row(whole: Comparison, key: str, names: tuple[str, str, str], series: int | None, place: Standing | None) -> Row:
    known = {JUDGED[whole.judge]: place.interval} if place is not None else {}
    cells = {column.key: cell(whole.runs_of(key), column, known.get(column.key)) for column in COLUMNS}
    lr = next((run.lr for run in whole.runs_of(key, None) if run.lr is not None), None)
    return Row(whole, key, *names, series, place, cells, lr, remark(whole, key))


def _grid(rows: Sequence[Row], shown: Sequence[Column], *, rank: bool, many: bool) -> str:
    header = [*["comparison"] * many, *["rank"] * rank, "method", *(column.title for column in shown)]
    aligned = ["---"] * many + ["---:"] * rank + ["---"] + ["---:"] * len(shown)
    lines = [header, aligned]
    for row in rows:
        cells = [plain(row.folder)] * many + [str(row.rank or amounts.MISSING)] * rank + [plain(row.label)]
        lines.append([*cells, *(str(row.cells[column.key]) for column in shown)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """Write a text so that Markdown shows it on one line as it is; no mark, tag or control character in it acts."""
    for mark in "\\|*`[<":
        text = text.replace(mark, f"\\{mark}")
    return shown(" ".join(text.split()))


def _inert(value: object) -> object:
    """A cell that no spreadsheet takes for a formula: texts that begin like one get an apostrophe, numbers nothing."""
    if not isinstance(value, str):
        return value
    try:
        float(value)
    except ValueError:
        return shown(f"'{value}" if value.lstrip()[:1] in ("=", "+", "-", "@") else value)
    return value
