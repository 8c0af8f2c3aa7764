"""Names of other libraries that have no promise behind them are imported in two files only, which list them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import adapterlab
from adapterlab.foreign import private_torch, private_transformers

ROOT = Path(adapterlab.__file__).parent
LISTED = (Path(private_torch.__file__), Path(private_transformers.__file__))
OTHERS = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "huggingface_hub")


def private_uses(text: str) -> Iterator[str]:
    """Yield what a file imports from, or reaches for in, private places of other libraries."""
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            library, *parts = name.split(".")
            if library in OTHERS and any(re.match(r"_[A-Za-z]", part) for part in parts) and "aten" not in parts:
                yield name


def test_private_names_are_imported_in_the_listing_files_alone() -> None:
    found = {
        str(path.relative_to(ROOT)): uses
        for path in ROOT.rglob("*.py")
        if path not in LISTED and (uses := sorted(set(private_uses(path.read_text(encoding="utf-8")))))
    }
    assert found == {}


def test_what_is_exported_is_listed_with_what_replaces_it() -> None:
    for module in (private_torch, private_transformers):
        listed = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", module.__doc__ or "", re.MULTILINE))))
        assert listed == set(module.__all__)


def test_the_search_finds_private_names() -> None:
    text = "from torch._C import X\nimport torch.utils._pytree\nimport torch\ny = torch._softmax_backward_data\n"
    assert sorted(private_uses(text)) == ["torch._C.X", "torch._softmax_backward_data", "torch.utils._pytree"]
