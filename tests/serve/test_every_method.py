"""Adapters of all methods that are served, of every form, at once; each method by itself is a check of the suite."""

from __future__ import annotations

import json
from pathlib import Path

from adapterlab import registry
from adapterlab.testing import Case
from adapterlab.testing.serving import FORMS, check_answers, engine, saved

SUPPORT = Path(__file__).parents[2] / "docs" / "support.json"


def test_all_methods_are_served_together(tmp_path: Path) -> None:
    rows = json.loads(SUPPORT.read_text(encoding="utf-8"))["methods"]
    cells = {id: rows[id]["features"]["served"] for id in registry.ids()}
    forms = {id: cell["detail"] for id, cell in cells.items() if cell["status"] == "passed"}
    assert {*forms.values()} == {*FORMS.values()}
    wanted = {}
    with engine(Case(registry.method(next(iter(forms)))).model(), len(forms) + 1) as server:
        for id in forms:
            wanted |= saved(Case(registry.method(id)), tmp_path, id)
            server.register(id, tmp_path / id)
        check_answers(server, wanted)
        assert {id: FORMS[server.adapter(id).form or "alone"] for id in forms} == forms
