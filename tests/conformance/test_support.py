"""The page on what is supported is what its data gives, and speaks of every method."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adapterlab.testing import Outcome

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_matrix", ROOT / "scripts" / "support_matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(script: ModuleType) -> None:
    data = json.loads((ROOT / "docs" / "support.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert script.faults(data, page) == []
    assert script.failures(data) == []


def test_missing_method_and_edited_page_are_noticed(script: ModuleType) -> None:
    data = json.loads((ROOT / "docs" / "support.json").read_text(encoding="utf-8"))
    page = script.render(data)
    assert script.faults(data, page + " ") == ["docs/support.md is not what docs/support.json gives"]
    gone = next(iter(data["methods"]))
    fewer = {**data, "methods": {id: found for id, found in data["methods"].items() if id != gone}}
    assert script.faults(fewer, page) == [f"method {gone}: not in the data"]


def test_words_and_rows_are_brought_up_to_date_without_measuring(script: ModuleType) -> None:
    data = json.loads((ROOT / "docs" / "support.json").read_text(encoding="utf-8"))
    old = copy.deepcopy(data)
    old["checks"] |= {"start": "Other words.", "gone": "A check that is no more."}
    old["methods"]["gone"] = old["methods"]["lora"]
    old["methods"]["vera"]["features"]["gone"] = {"status": "passed", "detail": ""}
    assert script.tidied(old) == data
    assert script.lacking(data) == []


def test_what_has_no_result_is_measured_and_the_rest_is_kept(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = json.loads((ROOT / "docs" / "support.json").read_text(encoding="utf-8"))
    fewer = copy.deepcopy(data)
    del fewer["methods"]["hra"]
    del fewer["methods"]["vera"]["features"]["start"]
    del fewer["methods"]["bitfit"]["merge"]["gpt2"]["nf4"]
    del fewer["methods"]["vera"]["peft"]["linear"]
    assert script.lacking(fewer) == ["bitfit", "hra", "vera"]
    ran = []

    def outcome(check: Any, case: Any) -> Outcome:
        ran.append((check.name, case.method.id, case.family, case.precision, getattr(case, "targets", None)))
        return Outcome(check.name, case, "failed", "for a try")

    monkeypatch.setattr(script, "outcome", outcome)
    monkeypatch.setattr(script, "STORED", tmp_path / "support.json")
    made = script.extend(fewer, ["bitfit", "vera"])
    assert ran == [
        ("merge", "bitfit", "gpt2", "nf4", None),
        ("start", "vera", "llama", "fp32", None),
        ("peft", "vera", "llama", "fp32", ("q", "v", "down")),
    ]
    assert json.loads((tmp_path / "support.json").read_text(encoding="utf-8")) == made
    assert script.failures(made) == ["bitfit: for a try", "vera: for a try", "vera: for a try"]
    assert script.lacking(made) == ["hra"]
