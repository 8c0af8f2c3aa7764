"""A run that is killed and resumed is the run that was not."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapterlab.errors import ConfigError, DataError, FormatError, OutputError, TrainingError
from adapterlab.train import Interrupted, Listener, Loop, fit
from adapterlab.train.folder import CHECKPOINT, RunFolder, claimed, read_state, write_state
from killing import at_every_change
from tiny_runs import write_data

Config = Callable[..., dict[str, Any]]
TIMED = ("seconds", "memory")


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def weights(run: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(run / part / "adapter_model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


class StopAfter(Listener):
    """Sends a signal to this process in the middle of a step's business."""

    def __init__(self, step: int, number: int = signal.SIGINT):
        self.step, self.number = step, number

    def stepped(self, loop: Loop, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.slow
def test_killed_at_every_kind_of_moment(root: Path) -> None:
    script = Path(__file__).parent / "kill_and_resume.py"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # many tiny operations: threads would only wait for each other
    done = subprocess.run([sys.executable, script, root], capture_output=True, text=True, timeout=240, env=one_thread)
    assert done.returncode == 0, done.stderr
    killed = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in killed] == ["False", "False", "False", "True", "True", "True", "True"]
    resumed, straight = root / "run", root / "straight"
    assert metrics(resumed) == metrics(straight)
    assert len(metrics(resumed)) == 12 + 3
    for part in ("best", "last"):
        assert same(weights(resumed, part), weights(straight, part)), part
    facts, expected = (json.loads((run / "run.json").read_text()) for run in (resumed, straight))
    assert facts["status"] == "finished"
    for key in ("best_loss", "best_step", "eval_loss", "train_loss", "tokens", "steps"):
        assert facts["result"][key] == expected["result"][key]
    assert not [path for path in resumed.iterdir() if path.name.startswith(".")], "nothing is left lying about"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_the_run_can_be_continued(config: Config, root: Path, number: int) -> None:
    straight = fit({**config(), "output": str(root / "straight")}, quiet=True)
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match="after step 7") as caught:
        fit(config(), quiet=True, callbacks=[StopAfter(7, number)])
    assert caught.value.folder == root / "run"
    assert signal.getsignal(number) is handler
    assert json.loads((root / "run" / "run.json").read_text())["status"] == "interrupted"
    resumed = fit(config(), resume=True, quiet=True)
    assert straight is not None
    assert resumed is not None
    assert metrics(resumed.folder) == metrics(straight.folder)
    assert same(weights(resumed.folder, "last"), weights(straight.folder, "last"))
    again = fit(config(), resume=True, quiet=True)  # finished: nothing is done twice
    assert again == resumed


def test_another_configuration_or_data_is_named(config: Config, root: Path) -> None:
    with pytest.raises(Interrupted):
        fit(config(), quiet=True, callbacks=[StopAfter(3)])
    other = config(lr=5e-3, save_every=1, log_every=3)
    other["method"] = {**other["method"], "r": 4}
    with pytest.raises(ConfigError) as caught:
        fit(other, resume=True, quiet=True)
    text = str(caught.value)
    assert "training.lr: 0.01 in the checkpoint, 0.005 now" in text
    assert "method.r: 2 in the checkpoint, 4 now" in text
    assert "save_every" not in text, "it cannot change the result"
    assert "log_every" not in text
    assert "config.yaml --resume" in text
    (root / "rows.jsonl").unlink()
    write_data(root / "rows.jsonl", seed=1)
    with pytest.raises(ConfigError, match="data fingerprint"):
        fit(config(), resume=True, quiet=True)


def test_folders_are_never_overwritten_unless_asked(config: Config, root: Path) -> None:
    first = fit(config(steps=3), quiet=True)
    assert first is not None
    before = weights(first.folder, "last")
    with pytest.raises(OutputError, match=r"not empty(.|\n)*--overwrite(.|\n)*--resume"):
        fit(config(steps=4), quiet=True)
    with pytest.raises(DataError, match=r"none\.jsonl"):
        fit({**config(steps=4), "data": {"path": str(root / "none.jsonl")}}, overwrite=True, quiet=True)
    assert same(weights(first.folder, "last"), before), "a run that cannot start removes nothing"
    second = fit(config(steps=4), overwrite=True, quiet=True)
    assert second is not None
    assert second.steps == 4
    assert len([m for m in metrics(second.folder) if "loss" in m]) == 4
    (root / "mine").mkdir()
    (root / "mine" / "thesis.txt").write_text("important")
    for option in ("overwrite", "resume"):
        with pytest.raises(OutputError, match="left alone"):
            fit({**config(), "output": str(root / "mine")}, quiet=True, **{option: True})
    (root / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        fit({**config(), "output": str(root / "file")}, quiet=True)
    with pytest.raises(OutputError, match="cannot be written"):
        fit({**config(), "output": "/proc/run"}, quiet=True)


def test_a_full_disk_leaves_the_checkpoint_before(config: Config, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, count = torch.save, iter(range(10))

    def full(state: Any, stream: Any) -> None:
        if next(count) == 1:
            stream.write(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, stream)

    straight = fit({**config(), "output": str(root / "straight")}, quiet=True)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match="disk is full"):
        fit(config(), quiet=True)
    assert json.loads((root / "run" / "run.json").read_text())["status"] == "failed"
    assert os.listdir(root / "run" / "checkpoint") == [CHECKPOINT.name]
    assert torch.load(root / "run" / CHECKPOINT, weights_only=True)["status"]["step"] == 5
    resumed = fit(config(), resume=True, quiet=True)
    assert straight is not None
    assert resumed is not None
    assert same(weights(resumed.folder, "last"), weights(straight.folder, "last"))


def test_a_damaged_checkpoint_is_named(config: Config, root: Path) -> None:
    with pytest.raises(Interrupted):
        fit(config(), quiet=True, callbacks=[StopAfter(3)])
    file = root / "run" / CHECKPOINT
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(FormatError, match=r"state\.pt cannot be read(.|\n)*--overwrite"):
        fit(config(), resume=True, quiet=True)


def test_no_flipped_bit_of_a_checkpoint_loads_another_state(tmp_path: Path) -> None:
    file, state = tmp_path / "state.pt", {"adapter": {"a": torch.randn(40)}, "status": {"step": 3, "loss": 0.25}}
    write_state(file, state)
    good, draw = file.read_bytes(), random.Random(0)
    assert torch.load(file, weights_only=True)["status"] == state["status"], "torch reads it without us"
    for _ in range(200):
        bit = draw.randrange(8 * len(good))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(FormatError, match=r"state\.pt cannot be read(.|\n)*--overwrite"):
            read_state(file)
    file.write_bytes(good)
    assert same(read_state(file)["adapter"], state["adapter"])
    torch.save(state, file)  # as early versions did
    assert same(read_state(file)["adapter"], state["adapter"])
    write_state(file, {"adapter": {"a": torch.tensor([1.0, torch.nan])}})
    with pytest.raises(FormatError, match="not finite, first in a"):
        read_state(file)


class Spoil(Listener):
    """Makes the adapter NaN after a step."""

    def __init__(self, step: int):
        self.step = step

    def stepped(self, loop: Loop, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            with torch.no_grad():
                next(iter(loop.host.tensors(loop.name).values())).view(-1)[0] = torch.nan


@pytest.mark.parametrize("step", [10, 12])  # the second checkpoint; the last step
def test_an_adapter_that_is_not_finite_replaces_nothing(config: Config, root: Path, step: int) -> None:
    fields = config()
    fields["data"]["eval_size"] = 0  # an evaluation would find out first
    with pytest.raises(TrainingError, match=rf"After step {step} (.|\n)* not finite(.|\n)*saved before is kept"):
        fit(fields, quiet=True, callbacks=[Spoil(step)])
    kept = read_state(root / "run" / CHECKPOINT)
    assert kept["status"]["step"] == (5 if step == 10 else 10)
    assert not (root / "run" / "last").exists()
    straight = fit({**fields, "output": str(root / "straight")}, quiet=True)
    resumed = fit(fields, resume=True, quiet=True)
    assert straight is not None
    assert resumed is not None
    assert same(weights(resumed.folder, "last"), weights(straight.folder, "last"))


def test_earlier_results_stay_until_there_are_new_ones(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Look(Listener):
        def settled(self, loop: Loop) -> None:
            seen.append(same(weights(root / "run", "last"), before))
            with pytest.raises(OutputError, match="Another process"):
                fit(config(), quiet=True, resume=True)

    def run(**training: Any) -> None:
        fields = config(steps=3, save_every=3, **training)
        fields["data"]["eval_size"] = 0
        fit(fields, overwrite=True, quiet=True, callbacks=[Look()])

    fit(config(steps=2), quiet=True)
    (root / "run" / "notes.txt").write_text("mine")
    before, seen = weights(root / "run", "last"), list[bool]()
    listed = sorted(os.listdir(root / "run"))
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OutputError, match="disk is full"):
            run()
    with pytest.raises(TrainingError):
        run(lr=1e38, clip=None, warmup=0, proof_steps=0)
    assert sorted(os.listdir(root / "run")) == listed
    assert same(weights(root / "run", "last"), before)
    assert json.loads((root / "run" / "run.json").read_text())["status"] == "finished"
    seen.clear()
    run(seed=1)
    assert seen == [True, True, True]
    assert not same(weights(root / "run", "last"), before)
    assert sorted(os.listdir(root / "run")) == [name for name in listed if name != "best"]


def test_a_run_may_be_killed_at_every_change_of_its_folder(tmp_path: Path) -> None:
    """The folder's part of a run, without the training between."""

    def session(step: int, **options: bool) -> None:
        accelerator = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
        state = {"adapter": {"a": torch.zeros(1)}, "status": {"step": step}}
        parallel = SimpleNamespace(taken_apart=lambda whole: (whole, {}))
        loop: Any = SimpleNamespace(
            status=SimpleNamespace(step=step), accelerator=accelerator, state_dict=lambda: state, parallel=parallel
        )
        with claimed(run, **{"resume": False, "overwrite": False, **options}):
            folder = RunFolder(run, {}, {})
            folder.begin("a: 1")
            folder.save(loop)
            folder.note("finished")

    def step() -> int:
        return int(read_state(run / CHECKPOINT)["status"]["step"])

    root, run = tmp_path / "r", tmp_path / "r" / "run"
    for _ in at_every_change(root, lambda: None, lambda: session(1)):
        shutil.copytree(root, tmp_path / "copy", dirs_exist_ok=True)
        for option in ("resume", "overwrite"):
            session(2, **{option: True})
            assert step() == 2
            assert sorted(os.listdir(run)) == ["checkpoint", "config.yaml", "metrics.jsonl", "run.json"]
            shutil.rmtree(run)
            shutil.copytree(tmp_path / "copy" / "run", run) if (tmp_path / "copy" / "run").exists() else None
        if not (run / "run.json").exists():
            session(3)
            assert step() == 3
        shutil.rmtree(tmp_path / "copy")
    for _ in at_every_change(root, lambda: session(1), lambda: session(2, overwrite=True)):
        with claimed(run, resume=True, overwrite=False):
            assert step() in (1, 2)
            assert len(os.listdir(run)) == 5  # with the lock
        session(3, overwrite=True)
        assert step() == 3
