"""The conformance suite that every method passes; third parties run it on theirs.

    from adapterlab.testing import run
    assert all(outcome.ok for outcome in run(MyMethod))

A check that does not apply is left out by the method's capabilities, never by its name. What a method cannot do it
must refuse with a typed error. `Method.example` gives settings for a tiny model, and the class attributes
`starts_at_base` and `trains` say what a method promises.
"""

from adapterlab.testing import checks, features, serving  # noqa: F401  (importing them fills the list of checks)
from adapterlab.testing.case import Case, NotApplicable
from adapterlab.testing.models import FAMILIES, PRECISIONS, batch, tiny
from adapterlab.testing.suite import CHECKS, Check, Outcome, attempt, check, checks_for, outcome, run

__all__ = [
    "CHECKS", "FAMILIES", "PRECISIONS", "Case", "Check", "NotApplicable", "Outcome", "attempt", "batch", "check",
    "checks_for", "outcome", "run", "tiny",
]  # fmt: skip
