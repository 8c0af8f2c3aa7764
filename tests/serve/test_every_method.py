"""Adapters of many methods, of every form, in one batch; each method by itself is a check of the suite."""

from __future__ import annotations

import json
from pathlib import Path

from adapterlab import registry
from adapterlab.testing import Case
from adapterlab.testing.serving import FORMS, check_answers, engine, saved

SUPPORT = Path(__file__).parents[2] / "docs" / "support.json"


def test_methods_of_all_forms_are_served_together(tmp_path: Path) -> None:
    rows = json.loads(SUPPORT.read_text(encoding="utf-8"))["methods"]
    cells = {id: rows[id]["features"]["served"] for id in registry.ids()}
    forms = {id: cell["detail"] for id, cell in cells.items() if cell["status"] == "passed"}
    served = [id for form in FORMS.values() for id in [one for one in forms if forms[one] == form][::4]]
    assert {forms[id] for id in served} == {*FORMS.values()}
    wanted = {}
    with engine(Case(registry.method(served[0])).model()) as server:
        for id in served:
            wanted |= saved(Case(registry.method(id)), tmp_path, id)
            server.register(id, tmp_path / id)
        check_answers(server, wanted)
