"""A method's name stands in its own file: no special case for one method hides in the core, the loop or the verbs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import adapterlab
from adapterlab import registry

ROOT = Path(adapterlab.__file__).parent

# The example that is trained when nothing else is asked for, and the form that other adapters are converted to.
ALLOWED = {
    "train/config.py": {"lora"},
    "cli/quickstart.py": {"lora"},
    "compare/advice.py": {"lora"},
    "cli/export.py": {"lora"},
    "convert/building.py": {"lora"},
    "convert/extracting.py": {"lora"},
}


def named(source: str, ids: set[str]) -> Iterator[str]:
    """Yield ids that code imports, spells as a string (docstrings and messages aside) or uses as a class."""
    classes = {id.replace("_", ""): id for id in ids}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adapterlab.methods"):
            found = {(node.module or "").rpartition(".")[2], *(alias.name for alias in node.names)}
            yield from found & ids
        elif isinstance(node, ast.Import):
            yield from {alias.name.rpartition(".")[2] for alias in node.names} & ids
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in ids:
            yield node.value
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name[:1].isupper() and name.lower() in classes:
                yield classes[name.lower()]


def test_no_method_is_named_outside_its_own_file() -> None:
    ids = set(registry.ids()) - {"full"}  # a word of its own
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT).as_posix()
        if place.startswith("methods/"):
            continue  # a composite names its parts, a variant the method it varies, a form those that share it
        foreign = set(named(path.read_text(encoding="utf-8"), ids)) - ALLOWED.get(place, set())
        if foreign:
            found[place] = foreign
    assert not found, f"methods are named where they do not belong: {found}"


def test_the_search_finds_what_it_is_made_for() -> None:
    ids = {"ia3", "fish_mask"}
    for code in (
        "if method.id == 'ia3': pass",
        "from adapterlab.methods.multiplicative.ia3 import x",
        "from adapterlab.methods import ia3",
        "import adapterlab.methods.multiplicative.ia3",
        "isinstance(m, IA3)",
        "isinstance(m, al.IA3)",
    ):
        assert set(named(code, ids)) == {"ia3"}, code
    assert set(named("al.FishMask()", ids)) == {"fish_mask"}
    assert not set(named('"""A word on ia3."""\nx = "choose ia3 instead"', ids))
