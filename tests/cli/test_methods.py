from __future__ import annotations

import json
import sys
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field

from adapterlab import registry
from adapterlab.cli import main
from adapterlab.core.method import Method


class Sketch(Method):
    """Change nothing, slowly.

    y = W x [sic]

    Example:
        >>> 1 + 1
        2
    """

    id: ClassVar[str] = "sketch_of_a_method"
    family: ClassVar[str] = "none"
    paper: ClassVar[str] = "On [nothing]"
    year: ClassVar[int] = 2031
    arxiv: ClassVar[str] = "3101.00001"
    formula: ClassVar[str] = "0"
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"

    speed: float = Field(0.5, gt=0, le=1, description="how slow")
    mode: Literal["idle", "off"] = Field("idle", description="which [kind]")
    note: str | None = Field(None, description="a remark")

    def prepare(self, host: Any, name: str, batches: Any) -> None:
        """Wait."""


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, Sketch.id, Sketch)


def run(capsys: Any, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["methods", *args])
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_the_list_has_what_the_classes_say(capsys: Any) -> None:
    code, out, _ = run(capsys, "--json")
    assert code == 0
    rows = {row["id"]: row for row in json.loads(out)}
    assert set(rows) == set(registry.ids())
    facts = {"family": "none", "year": 2031, "paper": "On [nothing]", "arxiv": "3101.00001", "formula": "0"}
    assert rows[Sketch.id].items() >= {**facts, "status": "experimental"}.items()
    assert rows[Sketch.id]["capabilities"]["needs_data"] is True
    assert rows["lora"]["capabilities"] == registry.method("lora").capabilities()


def test_a_pattern_and_the_table(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "sketch*")
    assert "none" in out.splitlines()[0]  # the family
    row = next(line for line in out.splitlines() if Sketch.id in line)
    assert "Change nothing, slowly. (experim" in row
    assert len(row) <= 80
    assert "lora" not in out


def test_the_page_of_a_method(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    _, out, _ = run(capsys, Sketch.id)
    for part in ("Change nothing, slowly.", "y = W x [sic]", ">>> 1 + 1", "float, > 0, <= 1", "'idle' | 'off'"):
        assert part in out
    for part in ("which [kind]", "str | None", "On [nothing] (2031)", "tuple[str, ...]", "experimental"):
        assert part in out
    _, out, _ = run(capsys, Sketch.id, "--json")
    page = json.loads(out)
    fields = {field["name"]: field for field in page["fields"]}
    assert set(fields) == set(Sketch.model_fields)
    assert fields["speed"] == {
        "name": "speed", "type": "float", "default": "0.5", "constraints": "> 0, <= 1", "description": "how slow"
    }  # fmt: skip
    assert page["page"].startswith("Change nothing")


@pytest.mark.parametrize("id", registry.ids())
def test_every_method_has_a_page(capsys: Any, id: str) -> None:
    code, out, _ = run(capsys, id)
    assert code == 0
    assert registry.method(id).__name__ in out


def test_no_match(capsys: Any) -> None:
    code, _, err = run(capsys, "lra")
    assert code == 2
    assert "No method matches 'lra'. Nearest: lora" in err


def test_help_needs_no_torch() -> None:
    import subprocess

    code = "import sys; from adapterlab.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert all(verb in done.stdout for verb in ("evaluate", "generate", "chat", "targets", "methods"))


def test_the_list_needs_neither_compiler_nor_modelling_code() -> None:
    """They take twice as long to import as all the rest."""
    import subprocess

    code = "import sys; from adapterlab.cli import main\nassert main(['methods', 'lora*']) == 0\n"
    code += "for name in ('torch._dynamo', 'transformers.modeling_utils', 'scipy', 'accelerate'):\n"
    code += "    assert name not in sys.modules, name"
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
