"""The page on what is supported is what its data gives, and speaks of every method."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_matrix", ROOT / "scripts" / "support_matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(script: ModuleType) -> None:
    data = json.loads((ROOT / "docs" / "support.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert script.faults(data, page) == []
    assert [
        cell for found in data["methods"].values() for cell in script._leaves(found) if cell["status"] == "failed"
    ] == []


def test_missing_method_and_edited_page_are_noticed(script: ModuleType) -> None:
    data = json.loads((ROOT / "docs" / "support.json").read_text(encoding="utf-8"))
    page = script.render(data)
    assert script.faults(data, page + " ") == ["docs/support.md is not what docs/support.json gives"]
    gone = next(iter(data["methods"]))
    fewer = {**data, "methods": {id: found for id, found in data["methods"].items() if id != gone}}
    assert script.faults(fewer, page) == [f"method {gone}: not in the data"]
