"""A claim is worth what it refuses: lists of lines of a method that are broken one by one, for which it must fail."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

# What is replaced and by what: (module or class, attribute, replacement).
Mutation = tuple[Any, str, Any]


def fails_without(*claims: Callable[..., None], lines: Mapping[str, Mutation]) -> Callable[..., None]:
    """Make a test that breaks one line after the other and expects that the claims, which hold, then do not.

    Args:
        claims: functions that assert, tests for example; they get the fixtures that their parameters name. Each line
            must make one of them fail, whichever: those that are soon done and have found most are asked first.
        lines: by the name of what is wrong; an error other than a failed assertion does not count.

    Returns:
        The test, parametrized by line; give it a name that begins with `test_`.
    """
    asked = [_Claim(claim) for claim in claims]

    @pytest.mark.parametrize("line", lines)
    def broken(line: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
        owner, attribute, replacement = lines[line]
        given = {claim: claim.fixtures(request, str(i)) for i, claim in enumerate(asked)}
        monkeypatch.setattr(owner, attribute, replacement)
        errors: list[BaseException] = []
        if not any(claim.fails(given[claim], errors) for claim in sorted(asked, key=_Claim.price)):
            raise errors[-1] if errors else AssertionError(f"every claim holds with {line!r}")

    return broken


def begun(layer: type, change: Callable[[Any, Any], object]) -> Mutation:
    """A start that is another: `change(layer, method)` as soon as the part of a method at one module has been made."""
    make: Any = layer.__init__

    def made(self: Any, method: Any, *rest: Any) -> None:
        make(self, method, *rest)
        with torch.no_grad():
            change(self, method)

    return (layer, "__init__", made)


class _Claim:
    """One of several claims, and what it has cost and found so far."""

    def __init__(self, hold: Callable[..., None]):
        self.hold, self.seconds, self.found = hold, 0.0, 0
        parameters = inspect.signature(hold).parameters.values()
        self.names = [p.name for p in parameters if p.default is p.empty]  # those that have no value yet

    def fixtures(self, request: pytest.FixtureRequest, folder: str) -> dict[str, Any]:
        """Return what the claim asks for; its folder is its own."""
        found = {name: request.getfixturevalue(name) for name in self.names if name != "monkeypatch"}
        if "tmp_path" in found:
            found["tmp_path"] /= folder
            found["tmp_path"].mkdir()
        return found

    def price(self) -> float:
        """Seconds for each line found; nothing for one that was never asked, so that all are once."""
        return self.seconds / (self.found + 1)

    def fails(self, given: Mapping[str, Any], errors: list[BaseException]) -> bool:
        """Say whether an assertion fails; whatever else is raised is noted."""
        began = time.perf_counter()
        try:
            with pytest.MonkeyPatch.context() as patch:  # its own: what it replaces is there again for the next
                self.hold(**given, **({"monkeypatch": patch} if "monkeypatch" in self.names else {}))
        except AssertionError:
            self.found += 1
            return True
        except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:
            errors.append(error)
        finally:
            self.seconds += time.perf_counter() - began
        return False
