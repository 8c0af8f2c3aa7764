"""Broken lines are found whichever claim they break, and it is asked first that found most in its time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from mutations import fails_without

LINE = SimpleNamespace(a=1, b=1)


def test_the_order_of_claims_changes_nothing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    asked: list[str] = []

    def slow() -> None:
        asked.append("slow")
        for _ in range(100_000):
            pass
        assert LINE.b == 1

    def quick() -> None:
        asked.append("quick")
        assert LINE.a == 1
        if LINE.b > 1:
            raise RuntimeError("something else")

    lines: Any = {"a": (LINE, "a", 2), "b": (LINE, "b", 2), "none": (LINE, "a", 1)}
    broken: Any = fails_without(slow, quick, lines=lines)
    for line, order in (("a", ["slow", "quick"]), ("a", ["quick"]), ("b", ["quick", "slow"])):
        with monkeypatch.context() as patch:
            broken(line, patch, request)
        assert asked == order
        asked.clear()
    with pytest.raises(AssertionError, match="every claim holds with 'none'"):
        broken("none", monkeypatch, request)
    with pytest.raises(RuntimeError, match="something else"):  # which is no failed assertion
        fails_without(quick, lines=lines)("b", monkeypatch, request)
