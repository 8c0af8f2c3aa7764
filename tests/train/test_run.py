"""Whole runs: the command line, what a run's folder says, dry runs, trackers, and other people's trainers."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import yaml
from accelerate.tracking import TensorBoardTracker
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from adapterlab.data import Collator
from adapterlab.errors import ConfigError, DataError, MissingDependencyError, TrainingError
from adapterlab.hosts import Host, attach, load
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.models import load_model
from adapterlab.train import AdapterlabCallback, Listener, Loop, RunResult, fit, hf_trainable
from adapterlab.train import run as run_module
from tiny_runs import cli

Config = Callable[..., dict[str, Any]]


@pytest.fixture
def file(config: Config, root: Path) -> str:
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(config(steps=4, eval_every=2, epochs=None)))
    return str(path)


def test_the_command_line_trains_and_says_what_is_next(
    file: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("train", file, "training.lr=5e-3", "method.r=3") == 0
    out = capsys.readouterr().out
    assert "command line" in out
    assert "What will train" in out
    assert "prompt, completion used; not used: none" in out
    assert "step 4/4" in out
    assert "evaluation loss" in out
    assert f"adapterlab evaluate {root / 'run'}" in out
    assert f"adapterlab chat {root / 'run' / 'best'}" in out
    facts = json.loads((root / "run" / "run.json").read_text())
    assert (facts["config"]["training"]["lr"], facts["config"]["method"]["r"]) == (5e-3, 3)
    assert facts["provenance"]["training.lr"] == "command line"
    assert facts["provenance"]["training.steps"] == "run.yaml"
    assert facts["provenance"]["training.clip"] == "default"
    assert facts["versions"]["torch"] == version("torch")  # a build may add a label to what torch calls itself
    assert facts["data"]["train_rows"] == 32
    assert facts["data"]["columns"] == {"used": ["prompt", "completion"], "unused": []}
    assert facts["model"]["trainable"] == facts["result"]["trainable"] > 0
    assert facts["result"]["memory"]["peak"] >= facts["result"]["memory"]["mean"] > 0
    assert cli("train", file) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli("train", file, "training.lrr=1") == 2
    assert "training.lr" in capsys.readouterr().err


def test_a_dry_run_checks_and_writes_nothing(file: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) | {"source": "web"} for line in (root / "rows.jsonl").read_text().splitlines()]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli("train", file, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "Every adapted module is reached" in out
    assert "not used: source" in out
    assert not (root / "run").exists()
    assert cli("train", file, "--dry-run", "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_control_c_on_the_command_line(
    file: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Loop.step

    def interrupted(loop: Loop) -> Any:
        if loop.status.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(loop)

    monkeypatch.setattr(Loop, "step", interrupted)
    assert cli("train", file, "method.alpha=3", "--quiet") == 130
    err = capsys.readouterr().err
    assert "interrupted after step 2" in err
    assert f"adapterlab train {file} method.alpha=3 --resume" in err
    monkeypatch.setattr(Loop, "step", step)
    assert cli("train", str(root / "run" / "config.yaml"), "--resume", "--quiet") == 0
    steps = [json.loads(line)["step"] for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "terminal is gone")])
def test_nobody_has_to_read_what_a_run_prints(
    file: str, root: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    monkeypatch.setenv("HOME", str(root))
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, Closed())
    result = fit({**yaml.safe_load(Path(file).read_text()), "output": "~/in/home"})
    assert result is not None
    assert result.last == root / "in" / "home" / "last"
    assert load(load_model(str(root / "model"), device="cpu")[0], "~/in/home/last").methods


def test_the_adapters_in_the_folder_are_those_of_the_metrics(config: Config, root: Path) -> None:
    """best/ loaded on a fresh base has the loss that the metrics say."""
    result = fit(config(lr=0.1, warmup=0, steps=8, eval_every=1, batch_size=2), quiet=True)
    assert isinstance(result, RunResult)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert result.best_loss == min(losses.values()) == losses[result.best_step]
    accelerator = run_module.make_accelerator(cfg := run_module.TrainConfig(**config()))
    rows = run_module.load(cfg, accelerator).eval_rows
    for folder, expected in ((result.best, result.best_loss), (result.last, result.eval_loss)):
        model, tokenizer = load_model(str(root / "model"), precision="fp32", device="cpu")
        load(model, folder)
        batch = Collator(tokenizer.pad_token_id)(rows)
        with torch.no_grad():
            assert float(model(**batch).loss) == pytest.approx(expected, rel=1e-4)


def test_without_evaluation_rows_there_is_no_best(config: Config, root: Path) -> None:
    fields = config(steps=2)
    fields["data"]["eval_size"] = 0
    result = fit(fields, quiet=True)
    assert result is not None
    assert (result.best, result.eval_loss, result.adapter) == (None, None, root / "run" / "last")
    assert not (root / "run" / "best").exists()


def test_trackers_receive_metrics(config: Config, root: Path) -> None:
    fields = config(steps=2, trackers="tensorboard", log_every=1)
    assert fit(fields, quiet=True) is not None
    assert list((root / "run" / "trackers").rglob("events.out.tfevents*"))


def test_a_tracker_that_does_not_start_is_named_and_one_that_fails_later_is_left_out(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    fields = config(steps=2, trackers="tensorboard", log_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardTracker, "start", fails)
        with pytest.raises(TrainingError, match=r"'tensorboard' did not start: OSError: no route.*leave it out"):
            fit({**fields, "output": root / "first"}, quiet=True)
    monkeypatch.setattr(TensorBoardTracker, "log", fails)
    with pytest.warns(UserWarning, match="left out from here on"):
        assert fit({**fields, "output": root / "second"}, quiet=True) is not None


def test_a_missing_tracker_is_said_before_anything_is_loaded(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install wandb"):
        fit(config(trackers="wandb"), quiet=True)
    with pytest.raises(MissingDependencyError, match=r"adapterlab\[trackers"):
        fit(config(trackers="tensorboard"), quiet=True)


def test_errors_of_the_data_come_through(config: Config, root: Path) -> None:
    fields = config()
    fields["data"] = {"path": str(root / "none.jsonl")}
    with pytest.raises(DataError, match=r"none\.jsonl"):
        fit(fields, quiet=True)


class Listening(LoRA):
    """Writes events down."""

    id: ClassVar[str] = "listening"
    log: ClassVar[list[Any]] = []

    def before_step(self, host: Host, name: str, step: int, optimizer: Any) -> None:
        self.log.append(("before", step))

    def after_backward(self, host: Host, name: str, step: int) -> None:
        assert all(p.grad is not None for p in host.parameters(name))
        self.log.append(("backward", step))

    def after_step(self, host: Host, name: str, step: int, optimizer: Any) -> None:
        assert all(p.grad is not None for p in host.parameters(name))
        self.log.append(("after", step))

    def finish(self, host: Host, name: str) -> None:
        self.log.append(("finish",))


def test_transformers_trainer_gives_the_same_events(
    tiny: Callable[..., Any], rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    Listening.log.clear()
    model = tiny("llama")
    host = attach(model, Listening(r=2, targets=["q"]))
    before = host.state_dict("default")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model, arguments, train_dataset=Dataset.from_list(rows))
    with hf_trainable(model):
        model.hf_quantizer = type(
            "Q", (), {"is_trainable": True, "is_qat_trainable": False, "quantization_config": None}
        )()
        trainer = Trainer(
            model, arguments, data_collator=Collator(0), train_dataset=Dataset.from_list(rows),
            callbacks=[AdapterlabCallback(host, "default")],
        )  # fmt: skip
    assert not getattr(model, "_hf_peft_config_loaded", False)
    del model.is_quantized, model.hf_quantizer
    trainer.train()
    steps = [(kind, step) for step in range(2) for kind in ("before", "backward", "after")]
    assert Listening.log == [*steps, ("finish",)]
    after = host.state_dict("default")
    assert any(not torch.equal(after[key], before[key]) for key in after)


def test_the_callback_refuses_what_it_cannot_do(tiny: Callable[..., Any]) -> None:
    class Steering(LoRA):
        id: ClassVar[str] = "steering"

        def gradient(self, host: Host, name: str, loss: Any, backward: Any) -> Any:
            return loss()

    with pytest.raises(ConfigError, match=r"own gradient(.|\n)*adapterlab\.train"):
        AdapterlabCallback(attach(tiny("llama"), Steering(r=2, targets=["q"])), "default")


def test_a_callback_that_comes_too_late_for_several_processes_says_so(tiny: Callable[..., Any]) -> None:
    host = attach(tiny("llama"), LoRA(r=2, targets=["q"]))
    optimizer = torch.optim.SGD(host.model.parameters())  # holds what trains later
    arguments: Any = SimpleNamespace(world_size=2)
    with pytest.raises(ConfigError, match=r"lora lets \d+ tensors train in later steps(.|\n)*callbacks="):
        AdapterlabCallback(host, "default").on_train_begin(arguments, *[None] * 2, optimizer=optimizer)  # type: ignore


def test_listeners_are_closed_after_an_error(config: Config) -> None:
    class Failing(Listener):
        closed_with: ClassVar[list[int]] = []

        def stepped(self, loop: Loop, record: dict[str, Any]) -> None:
            raise ZeroDivisionError

        def closed(self, loop: Loop) -> None:
            self.closed_with.append(loop.status.step)

    with pytest.raises(ZeroDivisionError):
        fit(config(), quiet=True, callbacks=[Failing()])
    assert Failing.closed_with == [1]
