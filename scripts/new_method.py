"""Begin a method: write `src/adapterlab/methods/<family>/<id>.py` and `tests/claims/test_<id>.py`, all that it needs.

    python scripts/new_method.py FAMILY/ID        for example multiplicative/my_method

The family is a folder under `src/adapterlab/methods`; without one, this lists them. The method works as it is (it
scales the outputs of linear layers), and so does its claim test, so that both can be changed step by step.
docs/writing_a_method.md says how.
"""

from __future__ import annotations

import ast
import keyword
import re
import sys
import textwrap
from pathlib import Path

from adapterlab.errors import nearest

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

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too).

    Start: g = 1 / scale, so the first output equals the base's.

    Trainable parameters: out for each module.

    Inference: diag(scale · g) W can be merged, at no cost.

    Rate: 5e-4, TODO: whose runs have it.

    Reference: "TODO: title", arXiv 0000.00000.

    Example:
        >>> from adapterlab.methods.FAMILY.ID import CLASS
        >>> CLASS(targets=["q", "v"]).scale
        2.0
    """

    formula: ClassVar[str] = "out"

    scale: float = Field(2.0, gt=0, description="TODO: each hyperparameter is a field with a constraint and a sentence")

    class Layer(Adapter):
        """The trainable part at one module."""

        def __init__(self, method: CLASS, site: Site):
            super().__init__(site)
            self.scale = method.scale
            self.g = site.parameter(site.shape[0])  # zeros, on the module's device, float32 on half-precision bases
            nn.init.constant_(self.g, 1 / self.scale)

        def gain(self) -> Tensor:
            """Scale · g `[out]`. Each line of the mathematics has a name, so that the claim test can break it."""
            return self.scale * self.g

        def around(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Compute the adapted module; `run` is the rest of the computation."""
            y: Tensor = run(x, *args, **kwargs)
            return (self.gain() * y.to(self.dtype)).to(y.dtype)
'''

CLAIM = '''"""TODO: the claim of the paper, in one line. Here: gains that were lost are found again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import adapterlab as al
from adapterlab.methods.FAMILY.ID import CLASS


def measure(width: int = 12) -> tuple[float, float]:
    """Train towards outputs with other gains: (last loss / first, distance of the outputs from the formula)."""
    torch.manual_seed(0)
    layer = nn.Linear(width, width)
    model, x = nn.Sequential(layer), torch.randn(64, width)
    target = (layer(x) * (1 + torch.rand(width))).detach()
    host = al.attach(model, CLASS(scale=4.0, targets=["0"]))
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.03)
    losses = []
    for _ in range(150):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    g = host.tensors("default")["adapter.0.g"].detach().double()
    with torch.no_grad():  # the formula once more, written apart from the method, in float64
        written = 4.0 * g * (x.double() @ layer.weight.double().T + layer.bias.double())
        return losses[-1] / losses[0], float((model(x) - written).abs().max())


def holds() -> bool:
    closed, apart = measure()
    return closed < 0.01 and apart < 1e-4


def test_the_claim_holds() -> None:
    assert holds()


BROKEN: dict[str, tuple[str, Callable[..., Any]]] = {
    "g does nothing": ("gain", lambda self: self.scale + 0 * self.g),
    "the scale is left out": ("gain", lambda self: self.g),
    "the wrong outputs are scaled": ("gain", lambda self: self.scale * self.g.flip(0)),
    "it adds instead of multiplying": ("around", lambda self, run, x: run(x) + self.gain() - 1),
    "it scales the input": ("around", lambda self, run, x: run(self.gain() * x)),
}


@pytest.mark.parametrize("line", BROKEN)
def test_the_claim_fails_when_a_line_is_broken(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLASS.Layer, *BROKEN[line])
    assert not holds()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_start_count_and_merge(family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, CLASS())
    assert (logits(model, batch) - base).abs().max() < 1e-5
    assert host.summary().trainable == sum(layer.site.shape[0] for layer in host.adapters("default").values())
    host.verify(batch)
    randomise(host, size=0.05)
    live = logits(model, batch)
    host.merge()
    assert (logits(model, batch) - live).abs().max() < 1e-3
'''


def class_name(id: str) -> str:
    """Name of the method's class: the id without underscores, in capitals at the words' beginnings."""
    return "".join(word[:1].upper() + word[1:] for word in id.split("_"))


def families(root: Path) -> list[str]:
    """The folders of methods.

    Raises:
        SystemExit: there is no such checkout.
    """
    folder = root / "src" / "adapterlab" / "methods"
    if not folder.is_dir():
        raise SystemExit(f"{root} is no checkout of adapterlab: it has no src/adapterlab/methods.")
    return sorted(path.parent.name for path in folder.glob("*/__init__.py"))


def split(place: str, known: list[str]) -> tuple[str, str]:
    """Read FAMILY/ID.

    Raises:
        SystemExit: the family is missing or there is none of that name.
    """
    family, _, id = place.rpartition("/")
    if family in known:
        return family, id
    if not family:
        raise SystemExit(
            f"A method is written as FAMILY/ID; received {place!r} without a family. Families: {', '.join(known)}. "
            f"For example: {known[0]}/{place}."
        )
    raise SystemExit(
        f"There is no family {family!r}. {nearest(family, known)} Families: {', '.join(known)}. A family is a folder "
        "under src/adapterlab/methods with an __init__.py of one line; for a new one, make that first."
    )


def check(family: str, id: str, root: Path) -> None:
    """Refuse an id that cannot be a module's name, or that is taken.

    Raises:
        SystemExit: with the rule and what was received.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", id) or keyword.iskeyword(id):
        raise SystemExit(
            f"An id has lower-case letters, digits and single underscores, begins with a letter and is no Python "
            f"keyword; received {id!r}. For example: {family}/my_method."
        )
    files = (root / "src" / "adapterlab" / "methods").glob("*/*.py")
    taken = {path.stem.replace("_", ""): path for path in files if not path.name.startswith("_")}
    if (other := taken.get(id.replace("_", ""))) is not None:
        raise SystemExit(
            f"The id {id!r} is taken by {other.relative_to(root)}: ids are one list over all families, and underscores "
            "do not tell them apart, because class names have none. Choose another, or edit that file."
        )
    test = root / "tests" / "claims" / f"test_{id}.py"
    if test.exists():
        raise SystemExit(f"{test.relative_to(root)} exists already. Remove it, or choose another id.")


def scaffold(place: str, root: Path = ROOT) -> list[Path]:
    """Write the two files of a method.

    Args:
        place: FAMILY/ID; the id is also the name of its file.
        root: of the checkout.

    Returns:
        What was written: the method, then its test.

    Raises:
        SystemExit: the family is unknown, or the id is not valid or taken; nothing is written then.
    """
    family, id = split(place, families(root))
    check(family, id, root)
    words = {"CLASS": class_name(id), "FAMILY": family, "ID": id}
    files = {
        root / "src" / "adapterlab" / "methods" / family / f"{id}.py": METHOD,
        root / "tests" / "claims" / f"test_{id}.py": CLAIM,
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(re.sub(rf"\b({'|'.join(words)})\b", lambda found: words[found[1]], text))
    return list(files)


def neighbours(method: Path) -> str:
    """What a family's methods share and who they are: the form to begin from may be there already."""
    files = sorted(path for path in method.parent.glob("*.py") if path.name != "__init__.py" and path != method)
    about = ast.get_docstring(ast.parse((method.parent / "__init__.py").read_text(encoding="utf-8"))) or ""
    shared = [path.name for path in files if path.name.startswith("_")]
    others = [path.stem for path in files if not path.name.startswith("_")]
    lines = [about, f"Shared there: {', '.join(shared)}." if shared else "", f"Written already: {', '.join(others)}."]
    return textwrap.fill(" ".join(line for line in lines if line), 80)


def main() -> None:
    """Write the files and say what comes next."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        known = ", ".join(families(ROOT))
        raise SystemExit(f"usage: python scripts/new_method.py FAMILY/ID\n\n{__doc__}\nFamilies: {known}.")
    method, test = (path.relative_to(ROOT).as_posix() for path in scaffold(sys.argv[1]))
    id = Path(method).stem
    print(f"wrote {method}\nwrote {test}")
    print(
        f"""
{neighbours(ROOT / method)}
Next, as docs/writing_a_method.md tells it:
  1. Write the formula into {method}; replace every TODO.
  2. Write the claim and a mutation for each line of the mathematics: pytest {test}
  3. See it, and what the common checks say: adapterlab methods {id}; python -m adapterlab.testing {id}
  4. If HF PEFT has the method, declare `hf = HFCodec(...)` and add tests/interop/test_peft_{id}.py.
  5. make docs (its page, the tables and its row of the support matrix); make check."""
    )


if __name__ == "__main__":
    main()
