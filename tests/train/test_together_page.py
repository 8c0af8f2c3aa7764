"""The page on training several adapters does what it says: its last block runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapterlab as al

PAGE = Path(__file__).parents[2] / "docs" / "training_together.md"


def test_the_page_runs(tiny: Callable[..., Any], rows: list[dict[str, list[int]]]) -> None:
    block = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[-1]
    known: dict[str, Any] = {"al": al, "model": tiny("llama"), "rows": rows}
    exec(block, known)
    assert [(ending.value.step, ending.error, ending.why) for ending in known["endings"]] == [
        (3, None, ""), (2, None, ""),
    ]  # fmt: skip
    assert known["host"].active == ("low",)
