"""The package's front door: lazy imports, names found by file, and errors of settings."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Literal

import pytest
from pydantic import Field

import adapterlab as al
from adapterlab.errors import AdapterlabError, ConfigError, nearest
from adapterlab.registry import register
from adapterlab.settings import Settings


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{m.partition('.')[0] for m in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize("code", ["import adapterlab", "import adapterlab as al; assert 'lora' in al.methods('lo*')"])
def test_importing_and_listing_load_no_heavy_package(code: str) -> None:
    heavy = {"torch", "transformers", "datasets", "accelerate", "numpy", "pydantic", "peft", "pandas"}
    assert not heavy & loaded_after(code)


def test_methods_are_listed_by_pattern() -> None:
    assert "lora" in al.methods("lo*")
    assert all(name.startswith("lo") for name in al.methods("lo*"))
    assert {"full", "freeze", "lora"} <= set(al.methods())
    assert al.methods("no-such-*") == []


def test_method_classes_are_attributes() -> None:
    assert al.LoRA is al.method("lora")
    assert al.Full is al.method("full")
    assert "LoRA" in dir(al)
    assert "attach" in dir(al)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="'Lorra'"):
        _ = al.Lorra
    with pytest.raises(AttributeError, match="_private"):
        _ = al._private
    with pytest.raises(ConfigError, match=r"'lorra'.*Nearest:.*lora.*adapterlab methods"):
        al.method("lorra")


def test_every_public_name_exists() -> None:
    for name in ("attach", "host", "Host", "Method", "LayerMethod", "Adapter", "Delta", "Site", "Targets", "State"):
        assert getattr(al, name).__name__ == name
    assert al.load.__name__ == "load"


def test_an_id_belongs_to_one_class() -> None:
    class Impostor(al.Method):
        id = "lora"

    assert al.LoRA.id == Impostor.id  # a class is known once it is asked for, by this test or one before it
    with pytest.raises(ConfigError, match=r"Two methods have the id 'lora'"):
        register(Impostor)


class Inner(Settings):
    depth: int = Field(1, ge=0)


class Outer(Settings):
    rate: float = Field(0.1, gt=0, lt=1)
    mode: Literal["slow", "fast"] = "slow"
    inner: Inner = Inner()
    name: str


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"name": "a", "rat": 0.5}, ["Outer has no setting 'rat'", "0.5", "Nearest: rate"]),
        ({}, ["needs the setting 'name'"]),
        ({"name": "a", "rate": 3}, ["rate = 3", "less than 1"]),
        ({"name": "a", "mode": "quick"}, ["mode = 'quick'", "'slow' or 'fast'"]),
        ({"name": "a", "inner": {"dept": 3}}, ["dept", "depth"]),
        ({"name": "a", "inner": {"depth": -1}}, ["depth", "-1"]),
        ({"rat": 1, "rate": 0, "mode": 3}, ["'rat'", "rate = 0", "mode = 3", "'name'"]),
    ],
)
def test_faults_are_named_with_the_value_and_the_way_out(fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        Outer(**fields)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert isinstance(error.value, AdapterlabError)
    assert isinstance(error.value, ValueError)


def test_settings_are_frozen_and_replace_validates() -> None:
    method = al.LoRA(r=4, targets=["q"])
    with pytest.raises(ValueError, match="frozen"):
        method.r = 8
    changed = method.replace(r=8)
    assert (changed.r, changed.targets, method.r) == (8, method.targets, 4)
    with pytest.raises(ConfigError, match="r = 0"):
        method.replace(r=0)
    with pytest.raises(ConfigError, match=r"'rr'.*Nearest: r"):
        method.replace(rr=1)


def test_nearest_names_close_words_or_what_is_valid() -> None:
    assert nearest("lorra", ["lora", "full"]) == "Nearest: lora."
    assert nearest("zzz", ["b", "a"]) == "Valid: a, b."
    assert "nothing" in nearest("x", [])
