"""What the forward of a class calls, and whose weights it reads without calling: found in its source."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BOUNDS = "cu_seq_lens_q"  # what flash attention in transformers calls the borders of packed samples
PLACES = "key_places"  # our own: of which token the keys and values are that packed samples see, where they share some
# What is asked of a weight without computing with it.
_FACTS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_cuda", "requires_grad", "quant_state"}
_QUESTIONS = {"isinstance", "hasattr", "getattr", "type", "id", "len"}


@dataclass(frozen=True)
class Calls:
    """What a class does with its submodules in forward, and in the methods that forward calls on itself.

    Attributes:
        called: dotted paths of what is called.
        read: dotted paths of modules whose weight or bias enters a computation.
    """

    called: frozenset[str]
    read: frozenset[str]


@functools.cache
def argument_names(cls: Any) -> tuple[str, ...]:
    """Return what the forward of a class takes, in order."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


@functools.cache
def calls(cls: Any) -> Calls:
    """Read the source of a class; a class without source calls and reads nothing."""
    called: set[str] = set()
    read: set[str] = set()
    waiting, seen = ["forward"], set()
    while waiting:
        name = waiting.pop()
        tree = _tree(cls, name)
        seen.add(name)
        if tree is None:
            continue
        asked = set(_asked(tree))
        for node in ast.walk(tree):
            path = _path(node.func) if isinstance(node, ast.Call) else None
            if path:
                called.add(path)
                if path not in seen and inspect.isfunction(getattr(cls, path, None)):
                    waiting.append(path)
            if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias") and id(node) not in asked:
                owner = _path(node.value)
                if owner:
                    read.add(owner)
    return Calls(frozenset(called), frozenset(read))


@functools.cache
def order(cls: Any) -> tuple[str, ...]:
    """Return dotted paths of what the forward of a class calls, in the order of its source; arguments come first."""
    return tuple(_called(_tree(cls, "forward") or ast.Module([], [])))


def _called(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        yield from _called(child)
    path = _path(node.func) if isinstance(node, ast.Call) else None
    if path:
        yield path


@functools.cache
def swaps_rows(cls: Any) -> bool:
    """Whether the forward of a class exchanges the first two dimensions of something, as models do that go by time."""
    for node in ast.walk(_tree(cls, "forward") or ast.Module([], [])):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            given = [a.value for a in node.args if isinstance(a, ast.Constant)]
            if (node.func.attr == "transpose" and given in ([0, 1], [1, 0])) or (
                node.func.attr == "permute" and given[:2] == [1, 0]
            ):
                return True
    return False


def _tree(cls: Any, name: str) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(getattr(cls, name))))
    except (OSError, TypeError, AttributeError, SyntaxError):
        return None


def _asked(tree: ast.AST) -> Iterator[int]:
    """Ids of the nodes that are only asked for facts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _FACTS:
            yield id(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _QUESTIONS:
            yield from (id(argument) for argument in node.args)
        elif isinstance(node, ast.Compare):  # `self.bias is not None`
            yield from (id(part) for part in (node.left, *node.comparators))


def _path(node: ast.AST) -> str | None:
    """`self.a.b` as "a.b"; None for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == "self" and parts else None
