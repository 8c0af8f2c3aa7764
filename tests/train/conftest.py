"""Fixtures of small runs; see `tiny_runs`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_folder import write_model
from tiny_runs import make_config, write_data


@pytest.fixture(scope="session")
def _prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("train")
    write_model(root / "model")
    write_data(root / "rows.jsonl")
    return root


@pytest.fixture
def root(_prepared: Path, tmp_path: Path) -> Path:
    """A folder with model/ and rows.jsonl; `run` in it is free."""
    for name in ("model", "rows.jsonl"):
        (tmp_path / name).symlink_to(_prepared / name)
    return tmp_path


@pytest.fixture
def config(root: Path) -> Callable[..., dict[str, Any]]:
    """`config(steps=3)`: fields of a run in `root`."""
    return lambda **training: make_config(root, **training)


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    """Token rows of several lengths for the tiny models of 128 tokens; the first third bears no label."""
    draw = random.Random(0)
    made = []
    for _ in range(24):
        ids = [draw.randrange(3, 128) for _ in range(draw.randrange(5, 12))]
        made.append({"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]})
    return made
