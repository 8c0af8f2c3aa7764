"""`DataConfig`: where rows come from, how they are read, cut and scored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from adapterlab.errors import nearest
from adapterlab.settings import SEEDS

# The columns that the known formats read; `formats.py` holds the formats themselves.
COLUMNS = (
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "question",
    "answer",
    "text",
    "system",
    "history",
    "tools",
    "documents",
    "chat_template_kwargs",
)
FormatName = Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "text"]
ScorerName = Literal["auto", "exact", "number", "verifier", "none"]
Mixing = Literal["joined", "in_sequence", "first_exhausted", "all_exhausted", "all_exhausted_without_replacement"]
TASK_ROWS = 2000
WINDOW = 1000
# What each of several sources may say for itself.
OF_SOURCE = (
    "path", "name", "revision", "split", "eval_path", "eval_split", "eval_size", "limit", "eval_limit", "format",
    "columns", "ignore", "system", "weight",
)  # fmt: skip
_WHERE = ("path", "name", "revision", "eval_path", "eval_split")  # these each source says for itself alone


class DataConfig(BaseModel):
    """Where the rows come from, how they become token rows, and how answers are scored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: str | None = Field(
        None,
        examples=["rows.jsonl"],
        description="Local .jsonl, .json, .csv, .tsv, .parquet or .arrow file, a folder or a pattern of such files, or "
        "a hub data set id.",
    )
    name: str | None = Field(
        None, examples=["main"], description="Configuration name of a hub data set, such as 'main' for openai/gsm8k."
    )
    revision: str | None = Field(
        None,
        examples=["v1.0"],
        min_length=1,
        description="Branch, tag or commit of a hub data set; null: the default branch. A run notes the commit that it "
        "began with, and reads the same when it is resumed.",
    )
    task: str | None = Field(
        None,
        examples=["chain_sum"],
        description="A reasoning-gym task that generates rows, such as 'chain_sum'. Exactly one of path, task and "
        "sources.",
    )
    task_args: dict[str, Any] = Field(
        default_factory=dict,
        examples=[{"min_terms": 2, "max_terms": 2}],
        description="Arguments of the task, such as {min_terms: 2, max_terms: 2}.",
    )
    sources: tuple[dict[str, Any], ...] | None = Field(
        None,
        examples=[({"path": "a.jsonl", "weight": 3}, {"path": "b.csv", "weight": 1})],
        min_length=1,
        description="Several sources, each with a path and what else describes it; what they leave out is taken from "
        "the settings beside. data: [{path: ...}, ...] is short for it.",
    )
    mixing: Mixing | None = Field(
        None,
        examples=["all_exhausted"],
        description="How sources become one pass: joined (all rows of all); in_sequence (one source after the other); "
        "or drawn by weight until the first is exhausted, or all are (with repeated rows of the smaller ones, or "
        "without). Null: first_exhausted with weights, else joined.",
    )
    streaming: bool | None = Field(
        None,
        examples=[True],
        description="Read rows while training and keep none, shuffled within a window; for what does not fit on the "
        "disk. Needs training.steps.",
    )
    window: int | None = Field(
        None, examples=[1000], ge=1, description=f"Rows of a stream that are shuffled together; null: {WINDOW}."
    )
    split: str = Field("train", min_length=1, description="Split to train on (hub data sets and folders).")
    eval_path: str | None = Field(
        None, examples=["held_out.jsonl"], description="File, folder or hub id of the evaluation rows."
    )
    eval_split: str | None = Field(
        None, examples=["test"], description="Split of the same hub data set or folder to evaluate on."
    )
    eval_size: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        examples=[0.1],
        description="Evaluation rows when there is no evaluation source: a number of rows, or a share of the training "
        "rows. Held out from the rows of a path, generated for a task. Default: 10 %, at most 200.",
    )
    limit: int | None = Field(
        None,
        examples=[1000],
        ge=1,
        description=f"Use the first n rows only; for a task, how many to generate (default {TASK_ROWS}).",
    )
    eval_limit: int | None = Field(None, examples=[100], ge=1, description="Use the first n evaluation rows only.")
    format: FormatName = Field("auto", description="How rows are laid out; 'auto' tells from the column names.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        examples=[{"prompt": "q", "completion": "a"}],
        description="Your names of the format's columns, such as {prompt: q, completion: a}.",
    )
    ignore: tuple[str, ...] = Field(
        (),
        examples=[("id",)],
        description="Columns, and fields of turns, to leave out although they could change what is learnt.",
    )
    system: str | None = Field(
        None,
        examples=["Answer briefly."],
        min_length=1,
        description="System message put before every row that brings none of its own.",
    )
    max_length: int = Field(1024, ge=2, description="Longest row in tokens; the model's window is never exceeded.")
    too_long: Literal["error", "drop"] = Field(
        "error", description="What to do with rows whose prompt leaves no room for any trained token."
    )
    train_on: Literal["completion", "all"] = Field(
        "completion", description="Which tokens are learnt: those of the assistant's turns, or all."
    )
    scorer: ScorerName = Field(
        "auto",
        description="How generated answers are compared with the reference: the same text, the same final number, or "
        "the task's own verifier.",
    )
    seed: int = Field(0, ge=0, lt=SEEDS, description="Seed of the held-out choice and of generated rows.")

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for ours in columns:
            if ours not in COLUMNS:
                raise ValueError(
                    f"{ours!r} is no column of any known format; write {{format column: your column}}. "
                    f"{nearest(ours, COLUMNS, n=5)}"
                )
        return columns

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return {"sources": value} if isinstance(value, (list, tuple)) else value

    @model_validator(mode="after")
    def _known_sources(self) -> Self:
        for i, given in enumerate(self.sources or (), 1):
            for key in given:
                if key not in OF_SOURCE:
                    raise ValueError(f"source {i} may not set {key!r}. {nearest(key, OF_SOURCE, n=5)}")
            if not given.get("path"):
                raise ValueError(f"source {i} has no path; received {given}")
        weights = [given.get("weight") for given in self.sources or ()]
        if any(weights) and not all(isinstance(w, (int, float)) and w > 0 for w in weights):
            raise ValueError(f"either all sources have a weight above 0, or none has; received {weights}")
        drawn = self.mixing is not None and self.mixing.endswith(("exhausted", "replacement"))
        if self.mixing is not None and (self.sources is None or drawn != any(weights)):
            raise ValueError(
                f"mixing={self.mixing} needs {'weights of the' if drawn else 'sources without weights:'} sources"
            )
        if self.sources is not None:
            self.parts()
        return self

    def parts(self) -> list[DataConfig]:
        """Return the settings of each of several sources."""
        shared = {k: getattr(self, k) for k in self.model_fields_set if k not in ("sources", "mixing")}
        return [
            DataConfig(**{**shared, **{k: v for k, v in given.items() if k != "weight"}})
            for given in self.sources or ()
        ]

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = {key: getattr(self, key) for key in ("path", "task", "sources") if getattr(self, key) is not None}
        if len(given) != 1:
            got = " and ".join(f"{key}={value!r}" for key, value in given.items()) or "neither"
            raise ValueError(
                f"set exactly one of path (rows of yours), task (generated rows) and sources; received {got}"
            )
        if self.sources and (idle := [key for key in _WHERE if getattr(self, key) is not None]):
            raise ValueError(f"{', '.join(idle)} belongs into each of the sources; received it beside them")
        if self.streaming and (self.task is not None or self.mixing is not None or isinstance(self.eval_size, float)):
            raise ValueError(
                "streaming reads rows of a path, or of sources by weight, and how many there are is not known: set "
                "eval_size to a number of rows, and neither task nor mixing"
            )
        if self.window is not None and not self.streaming:
            raise ValueError(f"window={self.window} is for streaming=true")
        if self.task is None and self.task_args:
            raise ValueError(f"task_args={self.task_args} needs a task; received path={self.path!r}")
        if self.task is not None:
            idle = [k for k in ("name", "revision", "eval_path", "eval_split", "columns", "ignore") if getattr(self, k)]
            if idle:
                raise ValueError(f"{', '.join(idle)} cannot be used with task={self.task!r}: its rows are generated")
        if self.eval_path and self.eval_split and self.eval_path == self.path:
            raise ValueError("set eval_split alone to evaluate on another split of the same data")
        if self.eval_size is not None and (self.eval_path or self.eval_split):
            raise ValueError("eval_size is for rows without an evaluation source; use eval_limit to cut that source")
        return self
