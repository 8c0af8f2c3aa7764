"""What a comparison is when it is written down: plain records, one JSON file, nothing that needs torch to be read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapterlab.errors import FormatError
from adapterlab.io.atomic import write_json
from adapterlab.io.links import check_links
from adapterlab.json_text import parsed
from adapterlab.paths import user_path

FILE = "comparison.json"
FORMAT = 1
_INDEX = "_runs_by_label"  # where a comparison keeps its index
UNTRAINED = "untrained"  # method id and label of the base model as it is
Interval = tuple[float, float]
Point = tuple[int, float]  # step, loss in nats a token
Status = Literal["waiting", "running", "finished", "failed"]


class Record(BaseModel):
    """Base of all records: frozen, and nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Sample(Record):
    """One evaluation question with one model's answer; `row` is the same question in every run.

    Attributes:
        row: position among the evaluation rows, counted from 0.
        right: whether the scorer took the answer for right; None where there is none.
    """

    row: int
    prompt: str
    reference: str
    answer: str
    right: bool | None


class Exam(Record):
    """How one checkpoint did on the evaluation rows. All lists have one entry a row, in the same order in every run.

    Attributes:
        loss: mean cross-entropy of the labelled tokens, in nats.
        losses: summed cross-entropy of each row, in nats.
        tokens: labelled tokens of each row.
        left_out: rows that leave no room for an answer within the longest row, and were asked of nobody.
        score: share of right answers; None where answers are not scored.
        interval: 95 % Wilson interval of the score.
        right: 1 or 0 for each row; empty where answers are not scored.
        samples: the first few answers.
    """

    loss: float
    losses: list[float]
    tokens: list[int]
    left_out: int = 0
    score: float | None = None
    interval: Interval | None = None
    right: list[int] = []
    samples: list[Sample] = []

    def marks(self, judge: str) -> tuple[list[float], list[float]]:
        """What each row gives the judge, and what it counts: its tokens for the loss, 1 for the score."""
        return (list(self.right), [1.0] * len(self.right)) if judge == "score" else (self.losses, list(self.tokens))


class Memory(Record):
    """Bytes of one training process of its own.

    Attributes:
        loaded: resident after loading the model, before training.
        peak: largest resident memory; on a GPU `gpu_peak` is the figure to look at.
        mean: mean resident memory over the steps.
        gpu_peak: largest memory of the GPU's allocator; None on other devices.
    """

    loaded: int
    peak: int
    mean: int
    gpu_peak: int | None = None


class Inference(Record):
    """Time of one forward pass over a fixed batch, relative to the plain base model in the same process (1 = equal).

    Attributes:
        unmerged: with the adapter beside the weights.
        merged: with the adapter written into the weights; None where that cannot be done.
        why_not_merged: the reason, else "".
        base_seconds: of the base model's pass.
    """

    unmerged: float
    merged: float | None = None
    why_not_merged: str = ""
    base_seconds: float


class Run(Record):
    """One method with one seed, from start to end. What could not be measured (yet) is None.

    Attributes:
        label: what people read, unique for each method with its settings, such as "lora r=8".
        key: the label as a folder name.
        method: id of the method, or "untrained".
        settings: those that were asked for.
        seed: of start values, order of rows and dropout.
        status: how far it is.
        reason: why it failed, else "".
        attempts: how often it was tried: failures, and what came of it.
        lost: how attempts ended whose machine or worker went away; it went on from its checkpoint each time.
        lr: learning rate it was trained with; None for the untrained model.
        together: how many runs shared the base in its training, itself among them; 1: it was by itself, which alone
            gives `memory` and `train_seconds`.
        alone: why it was by itself although runs like it share, else "".
        trainable: number of trainable scalars.
        total: number of scalars of model and adapter.
        memory: of the training process.
        steps: optimizer steps done.
        tokens: input tokens trained on, padding not counted.
        train_seconds: spent in training steps alone.
        wall_seconds: from the start of the process to its end, all attempts together: loading, training, measuring.
        best_step: step of the lowest validation loss.
        best_loss: that loss, of rows set apart from training, which are not those of the exams; `final_loss`: the one
            at the end; `train_loss`: of the last training steps (mean of ten). None for the untrained model.
        best: exam of the checkpoint with the lowest validation loss; `final`: of the last one. For the untrained model
            both are the same.
        general_loss: mean token loss on the general text shipped with the package, at the checkpoint to be used.
        forgetting: that loss minus the untrained model's on the same text; above 0 is worse.
        adapter_bytes: size of the adapter folder on disk.
        inference: cost of use.
        step_flops: floating point operations of one training step; `flops`: of the whole training.
        train_curve, eval_curve: [step, loss].
    """

    label: str
    key: str
    method: str
    settings: dict[str, Any] = {}
    seed: int
    status: Status = "waiting"
    reason: str = ""
    attempts: int = 0
    lost: tuple[str, ...] = ()
    lr: float | None = None
    together: int = 1
    alone: str = ""
    trainable: int | None = None
    total: int | None = None
    memory: Memory | None = None
    steps: int | None = None
    tokens: int | None = None
    train_seconds: float | None = None
    wall_seconds: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    final_loss: float | None = None
    train_loss: float | None = None
    best: Exam | None = None
    final: Exam | None = None
    general_loss: float | None = None
    forgetting: float | None = None
    adapter_bytes: int | None = None
    inference: Inference | None = None
    step_flops: float | None = None
    flops: float | None = None
    train_curve: list[Point] = []
    eval_curve: list[Point] = []

    @property
    def share(self) -> float | None:
        """Trainable share of all scalars."""
        return None if self.trainable is None else self.trainable / max(1, self.total or 1)

    @property
    def step_seconds(self) -> float | None:
        """Mean time of a training step."""
        return self.train_seconds / self.steps if self.train_seconds is not None and self.steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """Training speed."""
        return self.tokens / self.train_seconds if self.tokens and self.train_seconds else None

    @property
    def own_seconds(self) -> float | None:
        """Its part of `wall_seconds`: runs that share a process last as long as all of them do."""
        return None if self.wall_seconds is None else self.wall_seconds / self.together

    @property
    def peak_memory(self) -> int | None:
        """Peak in bytes: the GPU's if there is one."""
        return None if self.memory is None else self.memory.gpu_peak or self.memory.peak

    @property
    def is_untrained(self) -> bool:
        """Whether this is the base model as it is."""
        return self.method == UNTRAINED


class Trial(Record):
    """One learning rate in the search of one method.

    Attributes:
        lr: the rate.
        steps: how long it was trained.
        loss: evaluation loss at the end; None when training failed.
        reason: why it failed, else "".
        kept: whether it went on to the next round, or was chosen in the last.
        together: how many trials shared the base, itself among them.
    """

    lr: float
    steps: int
    loss: float | None = None
    reason: str = ""
    kept: bool = False
    together: int = 1


class Search(Record):
    """How the learning rate of one method came about.

    Attributes:
        label: of the method with its settings.
        auto: whether it was searched for; else it was given.
        chosen: the rate all its runs train with; None when no rate works.
        rounds: of successive halving, each with its trials by rising rate.
    """

    label: str
    auto: bool
    chosen: float | None
    rounds: list[list[Trial]] = []


class Standing(Record):
    """Where one method with its settings stands, over all its seeds.

    Attributes:
        label: of the method with its settings.
        rank: 1 is best; those that cannot be told apart share one. None when every run failed.
        value: mean of the judge (score or loss) at the best checkpoint.
        interval: 95 % bootstrap interval over evaluation rows and seeds.
        tied: labels with the same rank.
        finished: number of finished runs; `failed`: of failed ones.
        reason: of the first failure, else "".
    """

    label: str
    rank: int | None
    value: float | None = None
    interval: Interval | None = None
    tied: list[str] = []
    finished: int = 0
    failed: int = 0
    reason: str = ""


class Difference(Record):
    """How two methods differ in the judge, paired over evaluation rows: `a` minus `b`.

    Attributes:
        value: mean difference.
        interval: 95 % bootstrap interval over rows and seeds, not corrected.
        p: two-sided bootstrap p-value; `p_holm`: corrected for all pairs of the comparison.
        distinct: whether p_holm is below the level of the comparison.
    """

    a: str
    b: str
    value: float
    interval: Interval
    p: float
    p_holm: float
    distinct: bool


class Recommendation(Record):
    """Which method to take, in plain words.

    Attributes:
        text: the paragraph.
        best, least_memory, least_time: labels; None when nothing finished.
        undecided: labels that cannot be told apart from the best.
    """

    text: str
    best: str | None = None
    least_memory: str | None = None
    least_time: str | None = None
    undecided: list[str] = []


class Comparison(Record):
    """A whole comparison.

    Attributes:
        name: of its folder.
        started, updated: ISO 8601 times in UTC.
        finished: whether nothing is left to run.
        config: the exact configuration, every default written out.
        versions: of Python and packages; `platform`, `git`: where and from what it was run.
        conditions: what all runs share, ready to be read: device, threads, processes at a time, budget, rows, tokens.
        model: name, parameters, precision.
        data: source, fingerprint, number of rows.
        judge: "score" (share of right answers, higher is better) or "loss" (nats a token, lower is better).
        level: of significance after correction.
        runs: in the order of the configuration, seeds inside; the untrained model first.
        searches, standings (best first), differences (all pairs of trained methods and the untrained model).
    """

    format: int = FORMAT
    name: str
    started: str
    updated: str
    finished: bool
    config: dict[str, Any]
    versions: dict[str, str] = {}
    platform: str = ""
    git: str | None = None
    conditions: dict[str, Any] = {}
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    judge: Literal["score", "loss"]
    level: float = Field(0.05, gt=0, lt=1)
    runs: list[Run] = []
    searches: list[Search] = []
    standings: list[Standing] = []
    differences: list[Difference] = []
    recommendation: Recommendation | None = None

    @property
    def labels(self) -> list[str]:
        """Labels in the order of the configuration."""
        return list(dict.fromkeys(run.label for run in self.runs))

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the judge is better."""
        return self.judge == "score"

    @property
    def of_one_seed(self) -> bool:
        """Whether no trained method has finished with two seeds, so that differences are those of sets of weights."""
        finished = [s.finished for s in self.standings if s.label != UNTRAINED]
        return any(finished) and max(finished) == 1

    def runs_of(self, label: str, status: Status | None = "finished") -> list[Run]:
        """Return the runs of one label, by default the finished ones."""
        return [run for run in self._by_label().get(label, ()) if status in (None, run.status)]

    def _by_label(self) -> dict[str, list[Run]]:
        """Runs by label: a report asks for each label many times."""
        found: dict[str, list[Run]]
        runs, count, found = self.__dict__.get(_INDEX, (None, 0, {}))  # beside the fields, which alone are compared
        if runs is not self.runs or count != len(self.runs):  # copies bring the index of other runs
            found = {}
            for run in self.runs:
                found.setdefault(run.label, []).append(run)
            self.__dict__[_INDEX] = (self.runs, len(self.runs), found)
        return found

    def mean(self, label: str, figure: Callable[[Run], float | None]) -> float | None:
        """Return the mean of a figure over the finished runs of a label; None where none has it.

        Args:
            label: of the method with its settings.
            figure: such as `lambda run: run.step_seconds`.
        """
        return mean(figure(run) for run in self.runs_of(label))

    def save(self, folder: Path) -> None:
        """Write the comparison into its folder, atomically."""
        write_json(folder / FILE, self.model_dump(mode="json"))


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there."""
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def load(folder: str | Path) -> Comparison:
    """Read a comparison.

    Args:
        folder: of the comparison, or the JSON file itself.

    Raises:
        FormatError: there is none, or it is damaged or of another version.
    """
    file = user_path(folder)
    if file.is_dir():
        check_links(file)
        file = file / FILE
    if not file.is_file():
        raise FormatError(f"{file} does not exist: {folder} holds no comparison. Make one with: adapterlab compare.")
    try:
        content = parsed(file.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise ValueError(f"it has format {content.get('format')!r}, and this version reads {FORMAT}")
        return Comparison(**content)
    except (OSError, ValueError, TypeError, AttributeError, ValidationError) as error:
        raise FormatError(
            f"{file} cannot be read as a comparison: {error}. Run the comparison again in its folder: finished runs "
            "are kept and the file is written anew."
        ) from None
