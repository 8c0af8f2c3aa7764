"""`CompareConfig`: everything a comparison depends on, and the list of what is compared."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from adapterlab import yaml_text
from adapterlab.compare.results import UNTRAINED
from adapterlab.data.config import DataConfig
from adapterlab.errors import AdapterlabError, ConfigError, nearest
from adapterlab.paths import user_path
from adapterlab.settings import SEEDS, Settings, UserPath
from adapterlab.train.config import TrainConfig, Training, flatten

FULL = "full"
DATA, TRAIN, HELD = "data", "train.jsonl", "held.jsonl"  # rows to train on, and rows to choose checkpoints by
# What a comparison decides itself, and where it is said instead.
_GOVERNED = {
    "steps": "budget",
    "epochs": "budget",
    "lr": "lr",
    "seed": "seeds",
    "patience": "budget (the same for all)",
    "trackers": "nothing: read comparison.json",
}
_FREE = (
    "output",
    "trust_remote_code",
    "together",
    "processes",
    "threads",
    "gpus",
    "memory",
    "restarts",
    "slurm",
)  # settings that change nothing in the results
_EVALUATIONS = 5  # looks at the validation rows in a run, unless training.eval_every says otherwise
# Replaced with the rows.
_SOURCE = ("path", "name", "revision", "task", "task_args", "columns", "eval_path", "eval_split")
_RESERVED = ("name", "label", "lr")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Budget(_Part):
    """How long each run trains; the same for all. Set exactly one."""

    steps: int | None = Field(None, examples=[200], ge=1, description="optimizer steps")
    tokens: int | None = Field(
        None, examples=[1000000], ge=1, description="input tokens; turned into steps by the mean length of the rows"
    )
    minutes: float | None = Field(
        None, examples=[30], gt=0, description="training time; turned into steps by each method's own speed"
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = {key: value for key, value in self.model_dump().items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"set exactly one of steps, tokens and minutes; received {given or 'none'}")
        return self

    def __str__(self) -> str:
        return next(f"{value:,} {key}" for key, value in self.model_dump().items() if value is not None)


class SearchSettings(_Part):
    """How a learning rate is searched for: the better half of the rates goes on to the next, longer round."""

    rates: int = Field(4, ge=2, description="rates to begin with, around the one that suits the method")
    factor: float = Field(3.0, gt=1, description="from one rate to the next")
    fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.125, 0.25), min_length=1, description="shares of the budget that each round trains for"
    )
    extend: int = Field(4, ge=0, description="rates to add at most while the best lies at an end of those tried")


class Exams(_Part):
    """How each checkpoint is examined."""

    limit: int | None = Field(None, examples=[200], ge=1, description="use the first n evaluation rows only")
    batch_size: int = Field(32, ge=1, description="rows computed at once")
    max_new_tokens: int | None = Field(
        None, examples=[256], ge=1, description="longest answer; null: from the longest reference"
    )
    samples: int = Field(5, ge=0, description="answers kept for reading")
    costs: bool = Field(
        True,
        description="measure what each method costs too: time and memory of its training, operations of a step, time "
        "of a forward pass beside the weights and merged; false: runs of the first seed share a base as well",
    )


_Line = Annotated[str, Field(pattern=r"^[^\r\n]+$")]
_Word = Annotated[str, Field(pattern=r"^[\w.,@:+-]+$")]


class Slurm(_Part):
    """What `--engine slurm` asks the scheduler for; cores, GPUs and memory are `threads`, `gpus` and `memory`."""

    partition: _Word | None = Field(None, examples=["gpu"], description="where tasks wait; null: the cluster's default")
    account: _Word | None = Field(None, examples=["lab"], description="who pays; null: the user's default")
    time: Annotated[str, Field(pattern=r"^\d+(-\d+(:\d+){0,2}|(:\d+){0,2})$")] | None = Field(
        None, examples=["04:00:00"], description="limit of each task, in quotes; null: the partition's"
    )
    notice: int = Field(
        120, ge=30, description="seconds before the limit at which a task saves its run and goes back to the queue"
    )
    lines: tuple[_Line, ...] = Field(
        (), examples=[("--qos=high",)], description="further options of sbatch, each as it follows #SBATCH"
    )
    setup: tuple[_Line, ...] = Field(
        (), examples=[("module load cuda",)], description="lines of shell before the work starts"
    )

    @field_validator("lines")
    @classmethod
    def _options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [line for line in value if not line.startswith("-")]
        if wrong:
            raise ValueError(f"an option of sbatch begins with -, as in --qos=high; received {wrong[0]!r}")
        return value


class Contender(_Part):
    """One method with its settings.

    Attributes:
        label: what people read; unique.
        key: the label as a folder name; unique.
        method: id.
        settings: as given, grids resolved.
        lr: a rate, or "auto".
    """

    label: str
    key: str
    method: str
    settings: dict[str, Any] = {}
    lr: Literal["auto"] | float = "auto"


class CompareConfig(Settings):
    """A comparison: one model, one data set, several methods."""

    reference: ClassVar[str] = "All settings: adapterlab compare --help-config, or docs/configuration.md."

    model: str = Field("smollm2-135m", min_length=1, description="catalogue alias, hub id or local folder")
    trust_remote_code: bool = Field(False, description="run the code that the model's folder brings")
    precision: Literal["bf16", "fp32", "fp16"] = Field("bf16", description="dtype of the frozen weights")
    quantize: Literal["nf4", "int8"] | None = Field(
        None, examples=["nf4"], description="keep the frozen weights in 4 or 8 bits"
    )
    device: str | None = Field(None, examples=["cuda"], description="cpu, cuda, mps; null: the fastest there is")
    data: DataConfig = Field(description="where the rows come from")
    validation: Annotated[int, Field(ge=1)] | None = Field(
        None,
        examples=[100],
        description="training rows set aside to choose checkpoints and learning rates; null: a tenth, at most 100. "
        "The evaluation rows judge and choose nothing",
    )
    methods: tuple[dict[str, Any], ...] = Field(
        min_length=1,
        examples=[[{"name": "lora*"}]],
        description="what to compare; see the example file",
    )
    exclude: tuple[str, ...] = Field(
        (), examples=[("full",)], description="ids, or patterns of them, to leave out of patterns in methods"
    )
    full: bool = Field(False, description="compare with full tuning too")
    budget: Budget = Field(description="how long each run trains")
    seeds: tuple[Annotated[int, Field(ge=0, lt=SEEDS)], ...] = Field(
        (0, 1), min_length=1, description="a number of them, or all"
    )
    lr: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        "auto", description="auto: searched for each method; a method's own lr goes first"
    )
    search: SearchSettings = Field(default_factory=SearchSettings, description="how auto works")
    training: dict[str, Any] = Field(
        default_factory=dict, examples=[{"batch_size": 16}], description="how to train, as in a training configuration"
    )
    evaluation: Exams = Field(default_factory=Exams, description="how each checkpoint is examined")
    judge: Literal["auto", "score", "loss"] = Field(
        "auto", description="what ranks: the share of right answers, or the loss where answers cannot be scored"
    )
    level: float = Field(0.05, gt=0, lt=1, description="of significance, after correction for all pairs")
    together: Literal["auto", "never"] = Field(
        "auto",
        description="auto: the rates of one round of a search share a base in one process, and so do the runs of all "
        "seeds but the first, whose runs say what each method costs by itself; never: each has a process of its own",
    )
    processes: int | None = Field(
        None, examples=[2], ge=1, description="runs at a time; null: as memory and cores allow"
    )
    processes_per_run: int = Field(
        1, examples=[4], ge=1, description="processes of one machine that train each run together, on a GPU each where "
        "there are any: a step takes batch_size × accumulation × processes_per_run rows"
    )  # fmt: skip
    parallel: Literal["auto", "ddp", "fsdp", "zero2", "zero3"] = Field(
        "auto", description="how these processes hold the model, as in a training configuration; auto: ddp"
    )
    cpu_offload: bool = Field(False, description="with fsdp, zero2 and zero3: as in a training configuration")
    threads: int | None = Field(
        None, examples=[1], ge=1, description="CPU threads of each process of a run; null: cores shared fairly"
    )
    gpus: int | None = Field(
        None, examples=[2], ge=1, description="GPUs that each run has for itself, on one machine: one for each of its "
        "processes, or the layers of its model placed over all of them by a single process; null: one a process where "
        "Ray has any, not asked for with Slurm; the processes of a machine all see the same ones"
    )  # fmt: skip
    memory: Annotated[str, Field(pattern=r"^(?i:\d+(\.\d+)?\s*[mgt]i?b?)$")] | None = Field(
        None, examples=["32GB"], description="memory that a cluster sets aside for each run; null: not asked for"
    )
    restarts: int = Field(
        5, ge=0, description="how often a run goes on elsewhere whose machine or worker went away; one that fails by "
        "itself is tried twice"
    )  # fmt: skip
    slurm: Slurm = Field(default_factory=Slurm, description="how tasks are asked for with --engine slurm")
    output: UserPath = Field(Path("comparisons/default"), description="folder; nothing in it is overwritten unasked")

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self._check_training()

    @field_validator("methods", mode="before")
    @classmethod
    def _entries(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            value = [{str(key): inner} for key, inner in value.items()]
        if isinstance(value, str):
            value = [value]
        return [_entry(item) for item in value] if isinstance(value, Sequence) else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _number_or_list(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return tuple(range(value))
        if isinstance(value, (list, tuple)) and len(set(value)) < len(value):
            raise ValueError("each seed may be there once")
        return value

    @model_validator(mode="after")
    def _processes(self) -> Self:
        if self.processes_per_run == 1 and (self.parallel != "auto" or self.cpu_offload):
            raise ValueError(
                "parallel and cpu_offload say how the processes of a run hold its model, and there is one; received "
                f"parallel={self.parallel} and cpu_offload={self.cpu_offload}. Raise processes_per_run, or leave them "
                "out"
            )
        if self.processes_per_run > 1 and self.gpus not in (None, self.processes_per_run):
            raise ValueError(
                f"each of the {self.processes_per_run} processes of a run has one GPU; received gpus={self.gpus}. Set "
                f"gpus to {self.processes_per_run}, or leave it out"
            )
        return self

    def _check_training(self) -> None:
        for key, instead in _GOVERNED.items():
            if key in self.training:
                raise ConfigError(
                    f"training.{key}={self.training[key]!r} cannot be set in a comparison: {instead} decides."
                )
        try:
            Training(**self.training)
        except ValidationError as error:
            from adapterlab.settings import explain

            raise ConfigError(explain(error, Training).replace("Training", "training")) from None

    def contenders(self) -> list[Contender]:
        """List what is compared, patterns and grids resolved, the untrained model not among it.

        Raises:
            ConfigError: settings are wrong; all faults of all methods are in the message.
        """
        faults: list[str] = []
        entries = [*self.methods, *([{"name": FULL}] if self.full else [])]
        found = [item for entry in entries for item in _expand(entry, self.exclude, faults)]
        contenders = _labelled(found, self.lr, faults)
        for contender in contenders:
            try:
                TrainConfig(**self.train_fields(contender, steps=1, seed=0, lr=1e-3, output=Path("unused")))
            except AdapterlabError as error:
                faults.append(f"{contender.label}: {error}")
        twice = [label for label, count in Counter(c.label for c in contenders).items() if count > 1]
        faults += [f"{label}: it is there more than once; give each a 'label' of its own." for label in twice]
        if faults:
            raise ConfigError("These methods cannot be compared; nothing was run:\n" + "\n".join(faults))
        return contenders

    @property
    def spreads(self) -> bool:
        """Whether the one process of each run places its model over several devices."""
        several = self.gpus is not None and self.gpus > 1
        return several and self.processes_per_run == 1 and self.device in (None, "cuda")

    @property
    def shares(self) -> bool:
        """Whether trainings may share a base in one process."""
        return self.together == "auto" and self.processes_per_run == 1

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step of a run."""
        training = Training(**self.training)
        return training.batch_size * training.accumulation * self.processes_per_run

    def memory_bytes(self) -> int | None:
        """Return `memory` in bytes, a GB being 2^30 of them."""
        if self.memory is None:
            return None
        number, unit = float(re.split(r"[^\d.]", self.memory)[0]), self.memory.lower().rstrip("ib")[-1]
        return round(number * 1024 ** (2 + "mgt".index(unit)))

    def left_out(self) -> dict[str, list[str]]:
        """The methods that a pattern matches and that lack settings, with those; by themselves they are refused."""
        found = {id: _lacks(id, entry) for entry in self.methods for id in _matched(entry, self.exclude)}
        named = {str(entry["name"]) for entry in self.methods}  # are refused
        return {id: keys for id, keys in found.items() if keys and id not in named}

    def train_fields(self, contender: Contender, *, steps: int, seed: int, lr: float, output: Path) -> dict[str, Any]:
        """Return the fields of the `TrainConfig` of one run."""
        every = max(1, -(-steps // _EVALUATIONS))
        return {
            "model": self.model,
            "trust_remote_code": self.trust_remote_code,
            "precision": self.precision,
            "quantize": self.quantize,
            "device": None if self.spreads else self.device,
            "parallel": "device_map" if self.spreads else self.parallel,
            "cpu_offload": self.cpu_offload,
            "method": {"name": contender.method, **contender.settings},
            "data": self.train_data(),
            "training": {
                "eval_every": every, "save_every": every, **self.training, "steps": steps, "lr": lr, "seed": seed
            },
            "output": output,
        }  # fmt: skip

    def train_data(self) -> DataConfig:
        """Return where every run finds its rows: the files that the comparison wrote."""
        folder = (self.output / DATA).resolve()  # where the process works must not matter
        kept = self.data.model_dump(include={"max_length", "too_long", "train_on", "seed"})
        return DataConfig(path=str(folder / TRAIN), eval_path=str(folder / HELD), **kept)

    def plain(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**self.model_dump(mode="json"), "methods": [dict(entry) for entry in self.methods]}

    def decisive(self) -> dict[str, Any]:
        """Return what results depend on, as JSON values."""
        return {key: value for key, value in self.plain().items() if key not in _FREE}

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """Say in which settings an earlier configuration differs, those left out that cannot change results.

        A setting that it does not have is one of a later version, and was what is the default now.
        """
        usual = type(self)(data=self.data, methods=self.methods, budget=self.budget).plain()
        then, now = (
            dict(flatten({k: v for k, v in tree.items() if k not in _FREE}))
            for tree in ({**usual, **saved}, self.decisive())
        )
        return [
            f"  {key}: {then.get(key)!r} there, {now.get(key)!r} now"
            for key in dict.fromkeys([*then, *now])
            if then.get(key) != now.get(key)
        ]


def load_config(path: str | Path | None, changes: Mapping[str, Any] | None = None) -> CompareConfig:
    """Read a YAML file, with settings on top.

    Args:
        path: of the file; None when `changes` say everything.
        changes: nested settings; a method list replaces the one of the file.

    Raises:
        ConfigError: the file is missing or malformed, or a setting is unknown or out of range.
    """
    tree = yaml_text.read(user_path(path), "examples/compare_*.yaml") if path is not None else {}
    for key, value in dict(changes or {}).items():
        old = tree.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            gone = tuple(old) if key == "budget" else _SOURCE if _given_source(key, value) else ()
            old = {name: inner for name, inner in old.items() if name not in gone}
        both = isinstance(value, Mapping) and isinstance(old, Mapping) and key != "methods"
        tree[key] = {**old, **value} if both else value  # type: ignore[dict-item]
    return CompareConfig(**tree)


def _given_source(key: str, value: Mapping[str, Any]) -> bool:
    return key == "data" and not value.keys().isdisjoint(("path", "task"))


def _entry(item: Any) -> dict[str, Any]:
    """Bring one entry of the list into the form {name: id, **settings}."""
    if isinstance(item, str):
        return {"name": item}
    if isinstance(item, Mapping) and "name" in item:
        return dict(item)
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, settings),) = item.items()
        if settings is None or isinstance(settings, Mapping):
            return {"name": str(name), **(settings or {})}
    raise ValueError(f"a method is a name, {{name: {{settings}}}} or {{name: ..., settings}}; received {item!r}")


def _expand(entry: Mapping[str, Any], exclude: Sequence[str], faults: list[str]) -> Iterator[dict[str, Any]]:
    """Yield an entry for every method that its name matches, and every point of its grid."""
    from adapterlab import registry

    name = str(entry["name"])
    if not registry.ids(name):
        faults.append(f"{name}: no method has this id. {nearest(name, registry.ids())}")
    for id in _matched(entry, exclude):
        if id != name and _lacks(id, entry):
            continue
        cls: Any = registry.method(id)
        axes = {key: value for key, value in entry.items() if key != "label" and _is_grid(cls, key, value)}
        for point in itertools.product(*axes.values()):
            grid = dict(zip(axes, point, strict=True))
            yield {**entry, **grid, "name": id, "_grid": list(grid)}


def _matched(entry: Mapping[str, Any], exclude: Sequence[str]) -> list[str]:
    """The ids that the name of an entry matches; of a pattern less those that are excluded, and full tuning."""
    from adapterlab import registry

    name = str(entry["name"])
    out = {id for other in exclude for id in registry.ids(other)} | {FULL}
    return [id for id in registry.ids(name) if id == name or id not in out]


def _lacks(id: str, entry: Mapping[str, Any]) -> list[str]:
    """The settings that a method cannot do without and an entry has not, such as the adapters that it is made of."""
    from adapterlab import registry

    fields = registry.method(id).model_fields
    return [key for key, field in fields.items() if field.is_required() and key not in entry]


def _is_grid(cls: Any, key: str, value: Any) -> bool:
    """Whether a list holds alternatives, and is not itself a valid value of the setting."""
    if not isinstance(value, (list, tuple)) or key == "name":
        return False
    field = cls.model_fields.get(key)
    if field is None:
        return key == "lr"
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    try:
        TypeAdapter(kind).validate_python(value)
    except (ValidationError, ConfigError):
        return True
    return False


def _labelled(found: Sequence[Mapping[str, Any]], lr: Literal["auto"] | float, faults: list[str]) -> list[Contender]:
    """Name entries: by id, with what distinguishes those of the same id."""
    made = []
    several = Counter((item["name"], item.get("label")) for item in found)
    for item in found:
        settings = {key: value for key, value in item.items() if key not in (*_RESERVED, "_grid")}
        name = str(item.get("label") or item["name"])
        shown = item["_grid"] or (() if item.get("label") else tuple(settings))
        if several[item["name"], item.get("label")] > 1:
            name = " ".join([name, *(f"{key}={item[key]}" for key in shown)])
        made.append((name, settings, item))
    keys: Counter[str] = Counter({UNTRAINED: 1})
    contenders = []
    for label, settings, item in made:
        key = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "method"
        keys[key] += 1
        key = key if keys[key] == 1 else f"{key}-{keys[key]}"
        rate = item.get("lr", lr)
        if rate != "auto" and not (isinstance(rate, (int, float)) and 0 <= rate < float("inf")):
            faults.append(f"{label}: lr={rate!r} should be auto or a number, 0 or more, such as 1e-3.")
            continue
        contenders.append(Contender(label=label, key=key, method=item["name"], settings=settings, lr=rate))
    return contenders
