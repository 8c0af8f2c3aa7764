"""Engines of a tiny model, and what its adapters answer by themselves."""

from __future__ import annotations

from typing import Any

import pytest
from served import METHODS, Alone, Merged, tiny_llama

from adapterlab.serve import Engine, EngineSettings


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def merged(alone: Alone) -> Merged:
    return Merged(alone.root)


@pytest.fixture
def engine(alone: Alone) -> Any:
    """`engine(**settings)`: a running engine of the tiny model with all adapters registered."""
    made: list[Engine] = []

    def start(*names: str, tokenizer: Any = None, **settings: Any) -> Engine:
        given = {"page_tokens": 4, "step_tokens": 24, "max_running": 8, "memory_gb": 0.01}
        one = Engine(tiny_llama(), tokenizer, EngineSettings(**{**given, **settings}))
        made.append(one)
        for name in names or METHODS:
            one.register(name, alone.root / name)
        one.start()
        return one

    yield start
    for one in made:
        one.stop()
