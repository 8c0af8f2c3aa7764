"""A tiny model with rows that it can learn, and pools that need no processes.

Being here also puts this folder on the path, so that tests in it and below can import its modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inline_comparisons import InlinePool, small_comparison, use_inline_pool

from tiny_folder import write_model


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model."""
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def fields(tiny_base: Path, tmp_path: Path) -> dict[str, Any]:
    """A comparison that takes a second or two a run."""
    return small_comparison(tiny_base, tmp_path)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Callable[..., InlinePool]:
    """`inline()`: jobs run for real in this process; `inline(work)`: by a function that returns an exit status."""
    return functools.partial(use_inline_pool, monkeypatch)
