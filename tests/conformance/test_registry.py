"""Every registered method passes every check that its capabilities select, or refuses with a typed error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterlab import registry
from adapterlab.errors import AdapterlabError
from adapterlab.testing import CHECKS, Case, attempt, checks_for

SUPPORT = Path(__file__).parents[2] / "docs" / "support.json"


def cases() -> Iterator[Any]:
    for id in registry.ids():
        method = registry.method(id)
        for check in checks_for(method):
            for family in check.families:
                yield pytest.param(Case(method, family), check.name, id=f"{id}-{check.name}-{family}")


@pytest.fixture(scope="module")
def documented() -> dict[str, Any]:
    return json.loads(SUPPORT.read_text(encoding="utf-8"))["methods"] if SUPPORT.is_file() else {}


@pytest.mark.quick("name")
@pytest.mark.parametrize(("case", "name"), list(cases()))
def test_method_conforms(
    case: Case, name: str, documented: dict[str, Any], record_property: Any, recwarn: pytest.WarningsRecorder
) -> None:
    outcome = attempt(CHECKS[name], case)
    cell = documented.get(case.method.id, {}).get("features", {}).get(name)
    if name != "smoke" and cell is not None and case.family == "llama":  # the table's family
        assert cell["status"] == outcome.status, f"docs/support.json says {cell}, and it is {outcome}"
        assert outcome.status != "passed" or cell["detail"] == outcome.detail
    if outcome.status == "not applicable":
        pytest.skip(outcome.detail)
    if outcome.status == "refused":
        record_property("refused", outcome.detail)
        kind, _, text = outcome.detail.partition(": ")
        assert kind in {cls.__name__ for cls in _errors(AdapterlabError)}
        assert len(text.split()) > 8, f"a refusal says why and what to do instead: {text}"


def _errors(cls: type[Exception]) -> Iterator[type[Exception]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _errors(child)


@pytest.mark.parametrize("id", registry.ids())
def test_method_has_a_page(id: str) -> None:
    method = registry.method(id)
    text = method.__doc__ or ""
    assert method.__name__.lower() == id.replace("_", "")
    for part in ("Where it attaches:", "Trainable parameters:", "Rate:", "Reference:"):
        assert part in text, f"the docstring of {method.__name__} lacks {part!r}"
    assert method.formula
    assert method.paper
    assert not method.arxiv or method.arxiv in text


RATES = {
    "corda": 2e-5, "hra": 1e-4, "intrinsic_said": 3e-2, "longlora": 2e-5, "lora_ga": 2e-5, "lst": 3e-3, "olora": 1e-4,
    "pissa": 2e-5, "qlora": 2e-4,
}  # fmt: skip


@pytest.mark.parametrize("id", registry.ids())
def test_the_rate_is_the_one_that_the_page_states_with_its_source(id: str) -> None:
    method = registry.method(id)
    stated, _, source = (method.__doc__ or "").partition("Rate: ")[2].partition("\n\n")[0].partition(" ")
    assert method.typical_lr == float(stated.rstrip(",.:;")) == RATES.get(id, method.typical_lr)
    assert len(source.split()) > 0, "whose rate it is"
