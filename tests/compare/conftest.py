"""A tiny model with rows that it can learn, and pools that need no processes.

Being here also puts this folder on the path, so that tests in it and below can import `fabricate`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterlab.compare import engine
from tiny_folder import write_model


def write_rows(file: Path, count: int, seed: int) -> Path:
    """Questions whose answer is the first of two digits: learnt in a few steps."""
    draw = random.Random(seed)
    with file.open("w") as stream:
        for _ in range(count):
            a, b = draw.randrange(2), draw.randrange(10)
            stream.write(json.dumps({"prompt": f"{a} {b}=", "completion": str(a)}) + "\n")
    return file


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model."""
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def fields(tiny_base: Path, tmp_path: Path) -> dict[str, Any]:
    """A comparison that takes a second or two a run."""
    write_rows(tmp_path / "train.jsonl", 80, seed=1)
    write_rows(tmp_path / "eval.jsonl", 24, seed=2)
    return {
        "model": str(tiny_base),
        "precision": "fp32",
        "device": "cpu",
        "data": {"path": str(tmp_path / "train.jsonl"), "eval_path": str(tmp_path / "eval.jsonl")},
        "validation": 8,
        "methods": ["lora"],
        "budget": {"steps": 6},
        "seeds": 1,
        "lr": 1e-2,
        "training": {"batch_size": 4},
        "evaluation": {"max_new_tokens": 4},
        "output": tmp_path / "out",
    }


class InlinePool:
    """Does every job at once, in this process."""

    size, threads = 1, 1

    def __init__(self, work: Callable[[Path], int]):
        self.work = work
        self.started: list[Path] = []
        self.done: list[tuple[Path, int]] = []

    def start(self, folder: Path) -> None:
        self.started.append(folder)
        self.done.append((folder, self.work(folder)))

    def finished(self) -> list[tuple[Path, int]]:
        done, self.done = self.done, []
        return done

    def has_room(self) -> bool:
        return not self.done

    def stop(self) -> None:
        pass


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Callable[..., InlinePool]:
    """`inline()`: jobs run for real in this process; `inline(work)`: by a function that returns an exit status."""

    def use(work: Callable[[Path], int] | None = None) -> InlinePool:
        def real(folder: Path) -> int:
            from adapterlab.compare import worker

            return worker.main(str(folder))

        pool = InlinePool(work or real)
        monkeypatch.setattr(engine, "_pool", lambda config, name: pool)
        monkeypatch.setattr(engine, "_POLL", 0.0)
        return pool

    return use
