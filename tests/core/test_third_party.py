"""A method of another package is found by its entry point, listed without importing it, and used like ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import adapterlab as al
from adapterlab import registry
from adapterlab.errors import ConfigError

CODE = '''
from typing import ClassVar
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register

@register
class Guest(LoRA):
    """A method that lives elsewhere."""
    id: ClassVar[str] = "guest"
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package as pip leaves it: a module, and metadata with an entry point."""
    (tmp_path / "guest_package.py").write_text(CODE)
    info = tmp_path / "guest_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guest-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[adapterlab.methods]\nguest = guest_package:Guest\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    registry._registered.pop("guest", None)
    sys.modules.pop("guest_package", None)
    vars(al).pop("Guest", None)


def test_an_entry_point_adds_a_method(installed: None, tiny: Any, tmp_path: Path) -> None:
    assert al.methods("gue*") == ["guest"]
    assert "guest_package" not in sys.modules
    host = al.attach(tiny("llama"), al.Guest(r=2, targets=["q"]))
    assert type(host.methods["default"]).__module__ == "guest_package"
    host.save(tmp_path / "adapter")
    again = al.load(tiny("llama"), tmp_path / "adapter")
    assert again.methods["default"].id == "guest"


def test_without_the_package_the_method_is_unknown() -> None:
    with pytest.raises(ConfigError, match=r"There is no method 'guest'\."):
        al.method("guest")
