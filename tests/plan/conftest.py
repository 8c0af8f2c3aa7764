"""Simulations of these tests run in a child process, as those of long searches do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from adapterlab.plan.child import Child, apart


@pytest.fixture(scope="session")
def child() -> Iterator[Child]:
    with Child() as child:
        yield child


@pytest.fixture(autouse=True)
def _apart(child: Child) -> Iterator[None]:
    with apart(child):
        yield
