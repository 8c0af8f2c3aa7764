"""Begin a method: write `src/adapterlab/methods/<id>.py` and `tests/claims/test_<id>.py`, which is all it needs.

    python scripts/new_method.py my_method

The module works as it is (it scales the outputs of linear layers), so that it can be changed step by step. The claim
test fails until the claim is written.
"""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

METHOD = '''"""TODO: what the method does, in a few words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.registry import register


@register
class CLASS(LayerMethod):
    """TODO: one sentence on what is trained and how it changes the model.

    y = scale · g ⊙ (W x + b), g `[out]`.

    Where it attaches: linear layers.

    Start: g = 1, so the first output equals the base's when scale is 1.

    Trainable parameters: out for each module.

    Inference: can be merged, at no cost.

    Reference: "TODO: title", arXiv TODO.

    Example:
        >>> from adapterlab.methods.ID import CLASS
        >>> CLASS(targets=["q", "v"]).scale
        1.0
    """

    family: ClassVar[str] = "multiplicative"
    paper: ClassVar[str] = "TODO: title"
    year: ClassVar[int] = 0
    arxiv: ClassVar[str] = ""
    formula: ClassVar[str] = "out"

    scale: float = Field(1.0, gt=0, description="TODO: each hyperparameter is a field with a constraint and a sentence")

    class Layer(Adapter):
        """The trainable part at one module."""

        def __init__(self, method: CLASS, site: Site):
            super().__init__(site)
            out, _ = site.shape
            self.scale = method.scale
            self.g = site.parameter(out)  # zeros, on the module's device, float32 on half-precision bases
            nn.init.ones_(self.g)

        def around(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Compute the adapted module; `run` is the rest of the computation."""
            y: Tensor = run(x, *args, **kwargs)
            return (self.scale * self.g * y.to(self.dtype)).to(y.dtype)
'''

CLAIM = '''"""TODO: the claim of the paper, in one line."""

from __future__ import annotations

import pytest
import torch

import adapterlab as al
from adapterlab.methods.ID import CLASS


def measure() -> float:
    """The number that the claim is about, measured on a tiny model in a few seconds."""
    pytest.fail(
        "ID: write the claim. measure() returns the number the paper is about (a loss closed, bytes kept, a share of "
        "parameters); test_claim compares it with a threshold that a broken implementation misses."
    )


def test_claim():
    assert measure() >= 0.5


def test_claim_fails_when_the_method_is_broken():
    pytest.fail("ID: break the method here (monkeypatch a wrong axis or scale) and assert that the claim fails.")


def test_trainable_count_is_the_formula(tiny):
    host = al.attach(tiny("llama"), CLASS(targets=["q"]))
    assert host.summary().trainable == sum(a.site.shape[0] for a in host.adapters("default").values())


def test_starts_at_the_base(tiny):
    model = tiny("llama")
    ids = torch.arange(3, 9)[None]
    before = model(ids).logits
    al.attach(model, CLASS())
    assert torch.equal(model(ids).logits, before)
'''


def class_name(id: str) -> str:
    """Name of the method's class: the id without underscores, in capitals at the words' beginnings."""
    return "".join(word[:1].upper() + word[1:] for word in id.split("_"))


def check(id: str, root: Path) -> None:
    """Refuse an id that cannot be a module's name, or that is taken.

    Raises:
        SystemExit: with the rule and what was received.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", id) or keyword.iskeyword(id):
        raise SystemExit(
            f"An id has lower-case letters, digits and single underscores, begins with a letter and is no Python "
            f"keyword; received {id!r}. For example: my_method."
        )
    folder = root / "src" / "adapterlab" / "methods"
    if not folder.is_dir():
        raise SystemExit(f"{root} is no checkout of adapterlab: it has no src/adapterlab/methods.")
    taken = {path.stem.replace("_", ""): path for path in folder.glob("*.py")}
    if (other := taken.get(id.replace("_", ""))) is not None:
        raise SystemExit(
            f"The id {id!r} is taken by {other.relative_to(root)}: underscores do not tell ids apart, because class "
            "names have none. Choose another, or edit that file."
        )
    test = root / "tests" / "claims" / f"test_{id}.py"
    if test.exists():
        raise SystemExit(f"{test.relative_to(root)} exists already. Remove it, or choose another id.")


def scaffold(id: str, root: Path = ROOT) -> list[Path]:
    """Write the two files of a method.

    Args:
        id: of the method, also the name of its file.
        root: of the checkout.

    Returns:
        What was written.

    Raises:
        SystemExit: the id is not valid or taken; nothing is written then.
    """
    check(id, root)
    files = {
        root / "src" / "adapterlab" / "methods" / f"{id}.py": METHOD,
        root / "tests" / "claims" / f"test_{id}.py": CLAIM,
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text.replace("CLASS", class_name(id)).replace("ID", id))
    return list(files)


def main() -> None:
    """Write the files and say what comes next."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(f"usage: python scripts/new_method.py ID\n\n{__doc__}")
    id = sys.argv[1]
    for path in scaffold(id):
        print(f"wrote {path.relative_to(ROOT)}")
    print(
        f"""
Next:
  1. Write the formula into src/adapterlab/methods/{id}.py; replace every TODO.
  2. Write the claim: pytest tests/claims/test_{id}.py
  3. See it: adapterlab methods {id}
  4. If HF PEFT has the method, declare `hf = HFCodec(...)` and add tests/interop/test_peft_{id}.py.
  5. make check; make docs (the page and the table are generated)."""
    )


if __name__ == "__main__":
    main()
