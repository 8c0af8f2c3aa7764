"""`TrainConfig`: everything a training run depends on, from a YAML file and the command line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from adapterlab import yaml_text
from adapterlab.data.config import DataConfig
from adapterlab.errors import ConfigError, nearest
from adapterlab.paths import user_path
from adapterlab.settings import SEEDS, Settings, UserPath, keys

if TYPE_CHECKING:
    from adapterlab.core.method import Method

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Provenance = dict[str, str]
DEFAULT, COMMAND_LINE = "default", "command line"
EPOCHS = 3.0
# An override of the key drops these settings of the same group in the file.
_REPLACES = {
    ("training", "steps"): ("epochs",),
    ("training", "epochs"): ("steps",),
    ("data", "path"): ("name", "revision", "task", "task_args", "sources", "mixing"),
    ("data", "task"): (
        "path",
        "name",
        "revision",
        "columns",
        "eval_path",
        "eval_split",
        "task_args",
        "sources",
        "mixing",
    ),
    ("data", "sources"): ("path", "name", "revision", "task", "task_args", "eval_path", "eval_split"),
}


class Training(BaseModel):
    """How to train. A step is one update of the optimizer: batch_size × accumulation × processes rows."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int | None = Field(None, examples=[500], ge=1, description="optimizer steps; set this or epochs")
    epochs: float | None = Field(
        None,
        examples=[2.0],
        gt=0,
        description=f"passes over the training rows; set this or steps (neither: {EPOCHS:g})",
    )
    batch_size: int = Field(16, ge=1, description="rows computed at once on each process")
    accumulation: int = Field(1, ge=1, description="batches whose gradients are summed for one step")
    lr: float = Field(2e-4, ge=0, description="highest learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate after the warm-up")
    warmup: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = Field(
        0.03, description="warm-up from lr / warm-up steps: a number of steps (integer), or a share of all (below 1)"
    )
    min_lr: float = Field(0.0, ge=0, description="learning rate that the decay ends in")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="decay of AdamW's moments"
    )
    eps: float = Field(1e-8, gt=0, description="denominator term of AdamW")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each target spread evenly over the vocabulary; evaluation has none"
    )
    z_loss: float = Field(0.0, ge=0, description="coefficient of the squared logsumexp of the logits in training")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; null clips nothing")
    eval_every: int | None = Field(
        None, examples=[50], ge=1, description="steps between evaluations; null: ten in the run"
    )
    eval_batch_size: int | None = Field(
        None, examples=[8], ge=1, description="rows of an evaluation batch; null: batch_size"
    )
    save_every: int = Field(100, ge=1, description="steps between checkpoints; there is one at the end too")
    patience: int | None = Field(
        None,
        examples=[3],
        ge=1,
        description="stop after this many evaluations in a row without a new lowest loss; null: never",
    )
    recompute: Literal["none", "cheap", "full"] = Field(
        "none",
        description="what the backward pass computes again instead of keeping it: none; cheap (all but products and "
        "attention; about a third less memory); full (whole blocks; a forward pass more)",
    )
    offload: bool = Field(False, description="keep activations in the CPU's memory until the backward pass; GPU only")
    packing: bool | None = Field(
        None,
        examples=[False],
        description="rows of a batch behind each other instead of padded, which changes no gradient; null: whenever "
        "model and method allow it",
    )
    shared_openings: bool | None = Field(
        None,
        examples=[False],
        description="packed rows of a batch that begin alike (a system prompt, an instruction) compute that beginning "
        "once, which changes no gradient; null: whenever model and method allow it",
    )
    group_by_length: bool = Field(
        False, description="rows of like length in a step: less padding, and an order of rows that is less random"
    )
    proof_steps: int = Field(
        3, ge=0, description="steps within which every trainable tensor must have got a gradient and moved; 0: no check"
    )
    seed: int = Field(0, ge=0, lt=SEEDS, description="seed of the start values, the order of rows and dropout")
    trackers: tuple[TrackerName, ...] = Field(
        (), examples=[("tensorboard",)], description="experiment trackers that also receive the metrics"
    )
    log_every: int = Field(10, ge=1, description="steps between printed lines and tracker entries")

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"set one of steps and epochs; received steps={self.steps} and epochs={self.epochs}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}")
        return self

    def total_steps(self, rows: int, per_step: int) -> int:
        """Number of optimizer steps for a number of rows, `per_step` of them each."""
        return self.steps or math.ceil(self.row_limit(rows) / per_step)

    def row_limit(self, rows: int) -> int:
        """Number of rows after which training by epochs ends; a last step may be smaller than the others."""
        return math.ceil((self.epochs or EPOCHS) * rows)

    def warmup_steps(self, total: int) -> int:
        """Number of warm-up steps in a run of `total`.

        Raises:
            ConfigError: the run is over before the learning rate has risen.
        """
        steps = math.ceil(self.warmup * total) if isinstance(self.warmup, float) else self.warmup
        if steps > total:
            raise ConfigError(
                f"training.warmup={steps} steps are more than the {total} of this run, so the learning rate would "
                f"never reach training.lr={self.lr:g}. Choose at most {total}, or a share of the run such as 0.03."
            )
        return steps


class TrainConfig(Settings):
    """A training run: model, method, data, training, output."""

    reference: ClassVar[str] = "All settings: adapterlab train --help-config, or docs/configuration.md."

    model: str = Field("smollm2-135m", min_length=1, description="catalogue alias, hub id or local folder")
    trust_remote_code: bool = Field(False, description="run the code that the model's folder brings")
    precision: Literal["bf16", "fp32", "fp16"] = Field(
        "bf16", description="dtype of the frozen weights; adapters are float32"
    )
    quantize: Literal["nf4", "int8"] | None = Field(
        None, examples=["nf4"], description="keep the frozen weights in 4 or 8 bits"
    )
    device: str | None = Field(
        None, examples=["cuda:1"], description="cpu, cuda, cuda:1, mps; null: the fastest there is"
    )
    parallel: Literal["auto", "ddp", "fsdp", "zero2", "zero3", "device_map"] = Field(
        "auto",
        description="how the model is spread: over processes by ddp (each has it), fsdp or zero3 (each has a part of "
        "the base) or zero2 (the same, but whole from the forward to the backward pass), or over the devices of one "
        "process by device_map; auto: as accelerate was started, else ddp",
    )
    cpu_offload: bool = Field(
        False,
        description="where the base is split: keep parts that are not in use, and their moments, in the CPU's memory",
    )
    method: dict[str, Any] = Field(
        default_factory=lambda: {"name": "lora"},
        examples=[{"name": "lora", "r": 8}],
        description="the method's name and its settings, such as {name: lora, r: 8}",
    )
    data: DataConfig = Field(description="where the rows come from")
    training: Training = Field(default_factory=Training, description="how to train")
    output: UserPath = Field(
        Path("runs/default"), description="folder of the run; nothing in it is overwritten unasked"
    )

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.make_method()

    @field_validator("method", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, Mapping) and not isinstance(value.get("name"), str):
            raise ValueError("method needs a name, such as {name: lora, r: 8}; list them with: adapterlab methods")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.data.streaming and (self.training.steps is None or self.training.group_by_length):
            raise ValueError(
                "data.streaming needs training.steps, as nobody knows how many rows there are, and no group_by_length. "
                f"Received steps={self.training.steps} and group_by_length={self.training.group_by_length}"
            )
        if self.parallel == "device_map" and self.device is not None:
            raise ValueError(
                f"parallel=device_map places the model over all devices by itself; received device={self.device!r}. "
                "Leave device out"
            )
        if self.cpu_offload and self.parallel not in ("auto", "fsdp", "zero2", "zero3"):
            raise ValueError(
                f"cpu_offload goes with parallel=fsdp, zero2 and zero3; received parallel={self.parallel!r}"
            )
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError(
                "precision=fp16 trains on a GPU only: half precision overflows without loss scaling, and CPUs have no "
                "kernels for it. Set precision to bf16 or fp32"
            )
        return self

    def make_method(self) -> Method:
        """Make the method.

        Raises:
            ConfigError: the method or one of its settings is unknown or out of range.
        """
        from adapterlab.registry import method

        return method(self.method["name"])(**{key: value for key, value in self.method.items() if key != "name"})

    def meanings(self) -> dict[str, str]:
        """Return what each dotted key means, those of the method included."""
        return {key.name: key.meaning for key in (*keys(type(self)), *keys(type(self.make_method()), "method."))}

    def plain(self) -> dict[str, Any]:
        """Return everything as JSON values, the method's defaults included."""
        method = {"name": self.method["name"], **self.make_method().model_dump(mode="json")}
        return {**self.model_dump(mode="json"), "method": method}

    def flat(self) -> dict[str, Any]:
        """Return the values of `plain` by dotted key."""
        return dict(flatten(self.plain()))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with their dotted keys; empty mappings are leaves."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[TrainConfig, Provenance]:
    """Read a YAML file, with `a.b=c` overrides on top.

    An override also removes what it makes meaningless in the file: `method=NAME` the whole method there,
    training.steps the epochs (and the other way round), data.path and data.task what describes the source there.

    Args:
        path: of the file.
        overrides: such as `training.lr=1e-4`; values are read as YAML.

    Returns:
        The configuration, and for every dotted key where its value came from.

    Raises:
        ConfigError: the file is missing or malformed, or a setting is unknown or out of range.
    """
    path = user_path(path)
    from_file = _normal(yaml_text.read(path, "examples/*.yaml"))
    from_line = _normal(yaml_text.overrides(overrides))
    for tree in (from_file, from_line):
        _check_known(tree)
    _make_room(from_file, from_line)
    config = TrainConfig(**yaml_text.merged(from_file, from_line))
    return config, provenance(config, {path.name: from_file, COMMAND_LINE: from_line})


def provenance(config: TrainConfig, given: Mapping[str, Mapping[str, Any]]) -> Provenance:
    """Say for every dotted key of a configuration where its value came from.

    Args:
        config: the configuration.
        given: nested settings by the name of their source; later ones win.
    """
    sources = dict.fromkeys(config.flat(), DEFAULT)
    for source, tree in given.items():
        for key, _ in flatten(tree):
            sources.update({known: source for known in sources if f"{known}.".startswith(f"{key}.")})
    return sources


def _normal(tree: dict[Any, Any]) -> dict[str, Any]:
    normal = {str(key): value for key, value in tree.items()}
    if isinstance(normal.get("method"), str):
        normal["method"] = {"name": normal["method"]}
        normal["_replaces_method"] = True
    if isinstance(normal.get("data"), list):
        normal["data"] = {"sources": normal["data"]}
    return normal


def _make_room(file: dict[str, Any], line: dict[str, Any]) -> None:
    """Drop from the file what an override replaces."""
    file.pop("_replaces_method", None)
    if line.pop("_replaces_method", False):
        file.pop("method", None)
    for (group, key), others in _REPLACES.items():
        if (line.get(group) or {}).get(key) is not None and isinstance(file.get(group), dict):
            for other in others:
                file[group].pop(other, None)


def _check_known(tree: dict[str, Any]) -> None:
    """Check keys before values: the message gives the whole dotted path of the nearest setting."""
    known = _known_keys()
    faults = []
    for key, value in flatten({k: v for k, v in tree.items() if k not in ("method", "_replaces_method")}):
        if key in known or any(key.startswith(f"{free}.") for free in ("data.task_args", "data.columns")):
            continue
        by_name = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f"Nearest: {', '.join(by_name[:3])}." if by_name else nearest(key, known)
        faults.append(f"There is no setting {key!r} (received {value!r}). {hint}")
    if faults:
        faults.append(TrainConfig.reference)
        raise ConfigError("\n".join(faults))


def _known_keys() -> list[str]:
    groups: dict[str, type[BaseModel]] = {"data": DataConfig, "training": Training}
    inner = [f"{group}.{field}" for group, cls in groups.items() for field in cls.model_fields]
    return [*TrainConfig.model_fields, *inner]
