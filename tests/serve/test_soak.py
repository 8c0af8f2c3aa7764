"""The soak of the benchmarks, for a few seconds: every answer right, and nothing left."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_short_soak_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serving_soak as soak

    found = soak.work({"minutes": 0.05, "clients": 4, "adapters": 8})
    assert found["faults"] == []
    assert set(found["left"].values()) == {0}
    assert sum(found["done"].values()) >= 4
