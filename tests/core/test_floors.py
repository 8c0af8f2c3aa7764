"""Which package may import which: the floors of the house, and no circle anywhere.

Imports inside functions and for type checking count like all others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import adapterlab

ROOT = Path(adapterlab.__file__).parent

# From the ground up. A package may import what stands before it; what shares a line does not know its neighbours.
FLOORS = (
    ("errors", "version", "lazy", "terminal"),
    ("paths",),
    ("settings", "yaml_text", "json_text", "foreign", "registry"),
    ("ops", "optim", "data", "models"),
    ("core",),
    ("engine",),
    ("io",),
    ("hosts",),
    ("methods",),
    ("evaluate",),  # training evaluates, so the examination stands below it
    ("train", "convert", "serve"),
    ("plan", "testing"),
    ("compare",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}

UPWARD = {
    # Finding a method by name returns its class: the registry names the type and imports no more of it.
    ("registry", "core.method"),
    # A run says what it will need before it loads the weights, and a plan simulates the loop of training: the call goes
    # up once, when a run starts.
    ("train.run", "plan.before_run"),
    ("train.many", "plan.before_run"),
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in ROOT.rglob("*.py")}


def imports(text: str) -> Iterator[str]:
    """Yield the modules of this package that a file imports anywhere."""
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "adapterlab":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "adapterlab"]
        for name in names:
            found = name.partition(".")[2]
            while found and found not in MODULES:
                found = found.rpartition(".")[0]
            yield found


GRAPH = {name: set(imports(path.read_text(encoding="utf-8"))) - {name} for name, path in MODULES.items()}


def test_every_package_has_a_floor() -> None:
    assert {name.partition(".")[0] for name in MODULES} - {""} == set(LEVEL)


def test_no_arrow_points_upward_or_to_a_neighbour() -> None:
    wrong = []
    for name, targets in GRAPH.items():
        package = name.partition(".")[0]
        for target in targets:
            other = target.partition(".")[0]
            if name and package != other and (name, target) not in UPWARD:
                low, high = LEVEL.get(other, len(FLOORS)), LEVEL[package]
                if low >= high:
                    wrong.append(f"{name} -> {target or 'adapterlab'}")
    assert not wrong, "\n".join(sorted(wrong))


def test_the_exceptions_are_needed() -> None:
    assert {(name, target) for name, target in UPWARD if target in GRAPH[name]} == UPWARD


def test_there_is_no_circle() -> None:
    done: set[str] = set()
    for start in GRAPH:
        walk(start, [], done)


def walk(name: str, trail: list[str], done: set[str]) -> None:
    assert name not in trail, f"a circle: {' -> '.join([*trail[trail.index(name) :], name])}"
    if name in done:
        return
    for target in sorted(GRAPH[name]):
        walk(target, [*trail, name], done)
    done.add(name)
