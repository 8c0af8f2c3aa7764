"""A quick run has one case of each test, and of each check."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from selection import one_of_each


class Item:
    """What is asked of a test."""

    def __init__(self, nodeid: str, *marks: pytest.MarkDecorator, **params: Any):
        self.nodeid, self.callspec = nodeid, SimpleNamespace(params=params)
        self.get_closest_marker = {mark.name: mark.mark for mark in marks}.get


def test_one_case_of_each_test_and_of_each_value_of_a_parameter() -> None:
    each = pytest.mark.quick("check")
    items: list[Any] = [
        Item("a.py::plain"),
        *(Item(f"a.py::cases[{i}]") for i in range(20)),
        *(Item(f"a.py::all[{i}-{check}]", each, check=check) for i in range(20) for check in ("start", "merge")),
        Item("a.py::slow", pytest.mark.slow),
        Item("a.py::real", pytest.mark.model),
    ]
    found = one_of_each(items)
    assert [one.nodeid.partition("[")[0] for one in found] == ["a.py::plain", "a.py::cases", "a.py::all", "a.py::all"]
    assert {one.callspec.params["check"] for one in found[2:]} == {"start", "merge"}
    assert len({one.nodeid.partition("-")[0] for one in found[2:]}) == 2, "not the same method for all checks"
