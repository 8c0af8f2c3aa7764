"""A run that is killed and resumed is the run that was not."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import write_data

from adapterlab.errors import ConfigError, DataError, FormatError, OutputError
from adapterlab.train import Interrupted, Listener, Loop, fit
from adapterlab.train.folder import CHECKPOINT

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


def test_two_processes_equal_one(config: Config, root: Path) -> None:
    """Data parallel on the CPU: the same rows a step, so the same adapter up to rounding."""
    alone = {**config(steps=4, accumulation=2), "output": str(root / "alone")}
    alone["method"] = {**alone["method"], "dropout": 0.0}  # each process draws its own noise
    single = fit(alone, quiet=True)
    assert single is not None
    pair = {**alone, "output": str(root / "pair"), "training": {**alone["training"], "accumulation": 1}}
    code = f"from adapterlab.train import fit; fit({pair!r}, quiet=True)"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29671", "--no-python"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    left, right = metrics(root / "alone"), metrics(root / "pair")
    assert len(left) == len(right)
    for one, two in zip(left, right, strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    for key, value in weights(root / "pair", "last").items():
        torch.testing.assert_close(value, weights(root / "alone", "last")[key], rtol=1e-3, atol=1e-4)
