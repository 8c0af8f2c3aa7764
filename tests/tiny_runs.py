"""Rows, configurations for runs that take a second, and the command line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from adapterlab.cli import main


def cli(*args: str) -> int:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    return int(caught.value.code or 0)


def write_data(file: Path, count: int = 40, seed: int = 0) -> Path:
    draw = random.Random(seed)
    with file.open("w") as stream:
        for _ in range(count):
            a, b = draw.randrange(50), draw.randrange(50)
            stream.write(json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}) + "\n")
    return file


def make_config(root: Path, **training: Any) -> dict[str, Any]:
    """Fields of a TrainConfig: LoRA with dropout on the tiny model, accumulation 2."""
    defaults = {
        "steps": 12, "batch_size": 4, "accumulation": 2, "lr": 1e-2, "eval_every": 4, "save_every": 5, "warmup": 2
    }  # fmt: skip
    return {
        "model": str(root / "model"),
        "precision": "fp32",
        "device": "cpu",
        "method": {"name": "lora", "r": 2, "dropout": 0.2, "targets": ["q", "v", "down"]},
        "data": {"path": str(root / "rows.jsonl"), "eval_size": 8},
        "training": {**defaults, **training},
        "output": str(root / "run"),
    }
