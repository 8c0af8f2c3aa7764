"""Comparisons that take seconds: rows of a tiny task, and a pool that needs no processes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterlab.compare import engine


def write_rows(file: Path, count: int, seed: int) -> Path:
    """Questions whose answer is the first of two digits: learnt in a few steps."""
    draw = random.Random(seed)
    with file.open("w") as stream:
        for _ in range(count):
            a, b = draw.randrange(2), draw.randrange(10)
            stream.write(json.dumps({"prompt": f"{a} {b}=", "completion": str(a)}) + "\n")
    return file


def small_comparison(base: Path, folder: Path) -> dict[str, Any]:
    """Write rows into a folder, and return the settings of a comparison on them."""
    write_rows(folder / "train.jsonl", 80, seed=1)
    write_rows(folder / "eval.jsonl", 24, seed=2)
    return {
        "model": str(base),
        "precision": "fp32",
        "device": "cpu",
        "data": {"path": str(folder / "train.jsonl"), "eval_path": str(folder / "eval.jsonl")},
        "validation": 8,
        "methods": ["lora"],
        "budget": {"steps": 6},
        "seeds": 1,
        "lr": 1e-2,
        "training": {"batch_size": 4},
        "evaluation": {"max_new_tokens": 4},
        "output": folder / "out",
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


def use_inline_pool(patch: pytest.MonkeyPatch, work: Callable[[Path], int] | None = None) -> InlinePool:
    """Let comparisons do their jobs in this process."""

    def real(folder: Path) -> int:
        from adapterlab.compare import worker

        return worker.main(str(folder))

    pool = InlinePool(work or real)
    patch.setattr(engine, "_pool", lambda config, name: pool)
    patch.setattr(engine, "_POLL", 0.0)
    return pool
