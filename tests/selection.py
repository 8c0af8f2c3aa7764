"""Which tests run, and in which order: files with slow ones first; of a quick run one case of each of the others."""

from __future__ import annotations

import zlib
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one case of each test that is not slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # one of two processes would wait for a long test at the end
    if config.getoption("--quick"):
        items[:] = one_of_each(items)


def one_of_each(items: list[pytest.Item]) -> list[pytest.Item]:
    """One case of each test that is not slow and needs no real model; by the mark `quick`, one for each value of it.

    Its name decides which: of tests of all methods it is not always the first method's.
    """
    chosen: dict[tuple[str, Any], pytest.Item] = {}
    for item in items:
        if item.get_closest_marker("slow") or item.get_closest_marker("model"):
            continue
        each: Any = item.get_closest_marker("quick")
        key = item.nodeid.partition("[")[0], each and item.callspec.params[each.args[0]]  # type: ignore[attr-defined]
        chosen[key] = min(chosen.get(key, item), item, key=lambda one: zlib.crc32(one.nodeid.encode()))
    kept = set(chosen.values())
    return [item for item in items if item in kept]
