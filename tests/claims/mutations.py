"""A claim is worth what it refuses: lists of lines of a method that are broken one by one, for which it must fail."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

# What is replaced and by what: (module or class, attribute, replacement).
Mutation = tuple[Any, str, Any]


def fails_without(*claims: Callable[..., None], lines: Mapping[str, Mutation]) -> Callable[..., None]:
    """Make a test that breaks one line after the other and expects that the claims, which hold, then do not.

    Args:
        claims: functions that assert, tests for example; they get the fixtures that their parameters name. Each line
            must make one of them fail.
        lines: by the name of what is wrong; an error other than a failed assertion does not count.

    Returns:
        The test, parametrized by line; give it a name that begins with `test_`.
    """

    @pytest.mark.parametrize("line", lines)
    def broken(line: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
        owner, attribute, replacement = lines[line]
        given = [{name: request.getfixturevalue(name) for name in _fixtures(claim)} for claim in claims]
        monkeypatch.setattr(owner, attribute, replacement)
        with pytest.raises(AssertionError):
            _hold(claims, given)

    return broken


def begun(layer: type, change: Callable[[Any, Any], object]) -> Mutation:
    """A start that is another: `change(layer, method)` as soon as the part of a method at one module has been made."""
    make: Any = layer.__init__

    def made(self: Any, method: Any, *rest: Any) -> None:
        make(self, method, *rest)
        with torch.no_grad():
            change(self, method)

    return (layer, "__init__", made)


def _hold(claims: Sequence[Callable[..., None]], given: Sequence[Mapping[str, Any]]) -> None:
    for claim, fixtures in zip(claims, given, strict=True):
        claim(**fixtures)


def _fixtures(claim: Callable[..., None]) -> list[str]:
    """The parameters that have no value yet."""
    parameters = inspect.signature(claim).parameters.values()
    return [p.name for p in parameters if p.default is p.empty]
