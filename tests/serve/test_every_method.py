"""Adapters of every method that can be served, in one batch; each method by itself is a check of the suite."""

from __future__ import annotations

import json
from pathlib import Path

from adapterlab import registry
from adapterlab.testing import Case
from adapterlab.testing.serving import check_answers, engine, saved

SUPPORT = Path(__file__).parents[2] / "docs" / "support.json"


def test_all_methods_are_served_together(tmp_path: Path) -> None:
    rows = json.loads(SUPPORT.read_text(encoding="utf-8"))["methods"]
    served = [id for id in registry.ids() if rows[id]["features"]["served"]["status"] == "passed"]
    assert len(served) > len(rows) / 2
    wanted = {}
    with engine(Case(registry.method(served[0])).model()) as server:
        for id in served:
            wanted |= saved(Case(registry.method(id)), tmp_path, [id])
            server.register(id, tmp_path / id)
        check_answers(server, wanted)
