"""Configurations: files, overrides, provenance, and errors that name the nearest setting."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from adapterlab.errors import ConfigError
from adapterlab.train import TrainConfig, Training, load_config

YAML = """
model: smollm2-135m
method: {name: lora, r: 4, targets: all-linear}
data: {path: openai/gsm8k, name: main}
training:
  epochs: 2
  lr: 1e-3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def test_values_and_where_they_came_from(file: Path) -> None:
    config, sources = load_config(file, ["training.batch_size=3", "method.alpha=7", "training.trackers=[tensorboard]"])
    assert (config.training.lr, config.training.batch_size, config.training.trackers) == (1e-3, 3, ("tensorboard",))
    method = config.make_method()
    assert (method.r, method.alpha, method.targets.include) == (4, 7.0, ("all-linear",))
    assert sources["training.lr"] == sources["method.r"] == "run.yaml"
    assert sources["method.targets.include"] == "run.yaml"
    assert sources["training.batch_size"] == sources["method.alpha"] == "command line"
    assert sources["training.clip"] == sources["method.dropout"] == "default"
    assert sources.keys() == config.flat().keys()


def test_an_override_removes_what_it_replaces(file: Path) -> None:
    config, _ = load_config(file, ["training.steps=7", "data.path=rows.jsonl", "method=full"])
    assert (config.training.steps, config.training.epochs) == (7, None)
    assert (config.data.path, config.data.name) == ("rows.jsonl", None)
    assert config.method == {"name": "full"}
    config, _ = load_config(file, ["data.task=chain_sum"])
    assert (config.data.task, config.data.path) == ("chain_sum", None)
    with pytest.raises(ConfigError, match="steps=7 and epochs=2"):
        load_config(file, ["training.steps=7", "training.epochs=2"])


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.lrr=1", ["training.lrr", "training.lr"]),
        ("lr=1", ["'lr'", "training.lr"]),
        ("trainig.lr=1", ["trainig.lr", "training.lr"]),
        ("data.pth=x", ["data.pth", "data.path"]),
        ("training.lr=-1", ["training.lr = -1", "greater than or equal to 0"]),
        ("training.batch_size=0", ["training.batch_size = 0"]),
        ("training.lr=fast", ["training.lr = 'fast'", "number"]),
        ("training.schedule=cosin", ["training.schedule = 'cosin'", "'cosine'"]),
        ("training.warmup=1.5", ["training.warmup", "1.5"]),
        ("training.min_lr=1", ["min_lr=1.0", "lr=0.001"]),
        ("precision=fp8", ["precision = 'fp8'", "'bf16'"]),
        ("method.rr=3", ["'rr'", "Nearest: r"]),
        ("method.r=0", ["r = 0", "greater than or equal to 1"]),
        ("method.name=lorra", ["'lorra'", "lora"]),
        ("method={r: 3, name: 4}", ["method needs a name"]),
        ("training.lr", ["key=value"]),
        ("training.trackers=[tensorbord]", ["tensorbord", "'tensorboard'"]),
    ],
)
def test_wrong_settings_are_named_with_the_nearest(file: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    for part in parts:
        assert part in str(caught.value)


def test_fp16_on_a_cpu_is_refused_with_the_next_step(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"fp16.*bf16 or fp32"):
        load_config(file, ["precision=fp16", "device=cpu"])


LAUGHS = "a: &a [0, 0]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1\nprecision: x\n", "line 2"),
        ("model: a\nmodel: b\n", "'model' is there twice"),
        ("- a\n- b\n", "holds a list"),
        ("model: !!python/name:os.system x\n", "constructor for the tag"),
        ("[" * 5000, "nested too deeply"),
        (LAUGHS, "stand for more than"),
    ],
)
def test_malformed_files_are_named_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "none.yaml")


def test_data_is_required() -> None:
    with pytest.raises(ConfigError, match="'data'"):
        TrainConfig(model="x")


def test_a_dump_is_a_valid_configuration_again(file: Path) -> None:
    config, _ = load_config(file)
    again = TrainConfig(**config.plain())
    assert again.flat() == config.flat()


def test_numbers_of_steps() -> None:
    assert Training(epochs=2).total_steps(rows=25, per_step=10) == 5
    assert Training(epochs=0.5).total_steps(rows=25, per_step=10) == 2
    assert Training().total_steps(rows=10, per_step=10) == 3
    assert Training(steps=7, warmup=0.3).warmup_steps(7) == math.ceil(2.1)
    assert Training(warmup=5).warmup_steps(100) == Training(warmup=5).warmup_steps(5) == 5
    with pytest.raises(ConfigError, match=r"warmup=5 steps are more than the 4 of this run.*at most 4, or a share"):
        Training(warmup=5).warmup_steps(4)
    assert Training(warmup=0).warmup_steps(100) == Training(warmup=0.0).warmup_steps(100) == 0


def test_examples_are_valid() -> None:
    folder = Path(__file__).parents[2] / "examples"
    names = {path.name for path in folder.glob("*.yaml")}
    assert {"chain_sum_lora.yaml", "gsm8k_lora.yaml"} <= names
    config, _ = load_config(folder / "chain_sum_lora.yaml")
    assert config.data.task == "chain_sum"
    local, _ = load_config(folder / "gsm8k_lora.yaml", ["data.path=some/train.jsonl"])
    assert (local.data.path, local.data.name) == ("some/train.jsonl", None)
