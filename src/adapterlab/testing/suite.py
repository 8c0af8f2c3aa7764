"""The list of checks: which apply to a method, by its capabilities and promises alone, and how they are run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from adapterlab.core.method import Method
from adapterlab.errors import AdapterlabError
from adapterlab.testing.case import Case, NotApplicable

Status = Literal["passed", "refused", "not applicable", "failed"]
Run = Callable[[Case], str | None]
R = TypeVar("R", bound=Run)


@dataclass(frozen=True)
class Check:
    """One named check.

    Attributes:
        name: what it is called.
        what: one sentence on what it requires.
        run: the check; raises AssertionError, or an error of the library, and may return in what way it passed.
        families: the families of models it runs on by default.
        refuses: errors by which a method may say that it cannot do this.
        needs: capabilities that a method must have for the check to mean something; with "!" those it must not have.
    """

    name: str
    what: str
    run: Run
    families: tuple[str, ...]
    refuses: tuple[type[AdapterlabError], ...]
    needs: tuple[str, ...]

    def excluded(self, method: type[Method]) -> str:
        """Return why the check does not apply to a method, or ""."""
        have = {**method.capabilities(), "starts_at_base": method.starts_at_base, "trains": method.trains}
        for need in self.needs:
            if have[need.removeprefix("!")] == need.startswith("!"):
                state = "is" if need.startswith("!") else "is not"
                return f"{need.removeprefix('!').replace('_', ' ')} {state} among the method's capabilities"
        return ""


@dataclass(frozen=True)
class Outcome:
    """What came out of one check.

    Attributes:
        detail: why it was not passed, or in what way.
    """

    check: str
    case: Case
    status: Status
    detail: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the method conforms: what it cannot do it refuses with a typed error."""
        return self.status != "failed"

    def __str__(self) -> str:
        return f"{self.check}: {self.case}: {self.status}" + (f": {self.detail}" if self.detail else "")


CHECKS: dict[str, Check] = {}


def check(
    *needs: str,
    families: Sequence[str] = ("llama",),
    refuses: Sequence[type[AdapterlabError]] = (),
) -> Callable[[R], R]:
    """Decorator that adds a function `check_<name>(case)` to the suite.

    Args:
        needs: capabilities that the method must have, with "!" those it must not have.
        families: of models it runs on by default.
        refuses: errors by which a method may say that it cannot do this.
    """

    def add(function: R) -> R:
        name = function.__name__.removeprefix("check_")
        what = (function.__doc__ or "").strip().splitlines()[0]
        CHECKS[name] = Check(name, what, function, tuple(families), tuple(refuses), needs)
        return function

    return add


def checks_for(method: type[Method], family: str | None = None) -> Iterator[Check]:
    """Yield the checks that apply to a method, by its capabilities.

    Args:
        method: class of the method.
        family: only those that run on this family of models by default.
    """
    for found in CHECKS.values():
        if not found.excluded(method) and (family is None or family in found.families):
            yield found


def attempt(found: Check, case: Case) -> Outcome:
    """Run one check; a refusal in the form the check allows is an outcome, everything else is raised.

    Raises:
        AssertionError: the method does not conform.
        AdapterlabError: it refused what it must be able to do.
    """
    began = time.perf_counter()
    try:
        way = found.run(case)
    except NotApplicable as reason:
        return Outcome(found.name, case, "not applicable", str(reason), time.perf_counter() - began)
    except found.refuses as error:
        first = str(error).splitlines()[0]
        return Outcome(found.name, case, "refused", f"{type(error).__name__}: {first}", time.perf_counter() - began)
    return Outcome(found.name, case, "passed", way or "", time.perf_counter() - began)


def outcome(found: Check, case: Case) -> Outcome:
    """Run one check and report failures as outcomes too."""
    began = time.perf_counter()
    try:
        return attempt(found, case)
    except Exception as error:  # whatever a method under test raises is a finding
        detail = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return Outcome(found.name, case, "failed", detail, time.perf_counter() - began)


def run(method: type[Method], families: Sequence[str] | None = None) -> list[Outcome]:
    """Run every check that applies to a method.

    Args:
        method: class of the method; registered, since saving needs its id.
        families: of models; default: those each check names.

    Returns:
        One outcome for each check and family; conforming means that all are `ok`.
    """
    return [
        outcome(found, Case(method, family))
        for found in checks_for(method)
        for family in found.families
        if families is None or family in families
    ]
