"""The example of the guide for authors is what it says: a whole method that conforms."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from adapterlab import registry
from adapterlab.errors import AdapterlabError, nearest
from adapterlab.registry import _registered
from adapterlab.testing import CHECKS, Case, attempt

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "writing_a_method.md"
NAME = "adapterlab.methods.structured.rank_one"


@pytest.fixture
def module() -> Iterator[ModuleType]:
    """The first block of code of the guide, imported under the name that the guide gives it."""
    block = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    made = sys.modules[NAME] = ModuleType(NAME)
    try:
        exec(compile(block[1], "rank_one.py", "exec"), made.__dict__)
        yield made
    finally:
        sys.modules.pop(NAME)
        _registered.pop("rank_one", None)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "check", ["start", "count", "gradients", "save_load", "merge", "rows", "fields", "bf16", "peft"]
)
def test_the_example_conforms(check: str, family: str, module: ModuleType) -> None:
    assert module.RankOne.family == "structured"
    assert attempt(CHECKS[check], Case(module.RankOne, family)).status == "passed"


@pytest.mark.parametrize("line", ["the cheaper product", "the mutation"])
def test_what_the_guide_says_beside_it_works(line: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if line == "the cheaper product":
        cheaper = lambda self, x: (x @ self.v)[..., None] * (self.scale * self.u)  # noqa: E731
        monkeypatch.setattr(module.RankOne.Layer, "forward", cheaper)
        assert attempt(CHECKS["merge"], Case(module.RankOne)).status == "passed"
    else:
        monkeypatch.setattr(module.RankOne.Layer, "delta", lambda self: 0 * self.u[:, None] * self.v)
        with pytest.raises(AssertionError, match="no effect"):
            attempt(CHECKS["changes"], Case(module.RankOne))


def test_every_method_and_error_that_the_guide_names_exists(module: ModuleType) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    named = set(re.findall(r"\b[A-Z]\w+Error\b", text)) - {"ValueError"}
    errors = {cls.__name__ for cls in _below(AdapterlabError)}
    assert named <= errors, nearest(next(iter(named - errors)), errors)
    table = text.split("## Which verb when", 1)[1].split("## ", 1)[0]
    seen = [id for row in re.findall(r"\|([^|\n]*)\|\n", table) for id in re.findall(r"`(\w+)`", row)]
    assert len(seen) >= 6
    assert set(seen) <= set(registry.ids())


def _below(cls: type[Exception]) -> Iterator[type[Exception]]:
    for child in cls.__subclasses__():
        yield child
        yield from _below(child)
