"""VeRA: the whole adapter is a seed and two vectors a module."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterlab as al
from adapterlab.methods.structured import vera
from adapterlab.methods.structured._random_bases import seeded
from adapterlab.methods.structured.vera import _Scaled


def measure(tiny: Any, batch_for: Any, randomise: Any, logits: Any, folder: Path) -> float:
    """How far a model that was rebuilt from the seed and the vectors is from the one that was saved."""
    model = tiny("llama")
    batch = batch_for(model)
    host = al.attach(model, al.VeRA(r=6, targets=["q", "k", "down"], save_projection=False, seed=5))
    randomise(host)
    expected = logits(model, batch)
    host.save(folder)
    shapes = {tuple(t.shape) for t in load_file(folder / "adapter_model.safetensors").values()}
    assert all(len(shape) == 1 for shape in shapes)
    return float((logits(al.load(tiny("llama"), folder).model, batch) - expected).abs().max())


def test_seed_and_vectors_are_enough(tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path) -> None:
    assert measure(tiny, batch_for, randomise, logits, tmp_path / "a") < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_start_and_count(family: str, tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.VeRA(r=8))
    assert torch.equal(logits(model, batch), base)
    shapes = [a.site.shape for a in host.adapters("default").values()]
    assert host.summary().trainable == sum(o + 8 for o, _ in shapes)
    held = [t for t in host.tensors("default").values() if t.ndim == 2]
    assert len(held) == 2, "one pair for all modules"
    assert held[0].shape[1] == max(i for _, i in shapes)
    assert held[1].shape[0] == max(o for o, _ in shapes)
    host.verify(batch)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_the_formula_in_float64(family: str, tiny: Any, randomise: Any) -> None:
    host = al.attach(tiny(family), al.VeRA(r=5))
    randomise(host)
    for layer in host.adapters("default").values():
        site: Any = layer.site
        out, in_ = site.shape
        x = torch.randn(4, in_)
        a, b = layer.bases.A[:, :in_].double(), layer.bases.B[:out].double()
        update = layer.b.double() * ((x.double() @ a.T * layer.d.double()) @ b.T)
        base = x.double() @ site.weight().double().T + (0 if site.bias is None else site.bias.double())
        assert (site.module(x) - base - update).abs().max() < 1e-4


def test_gradients_are_those_of_the_formula() -> None:
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    a, b = draw(3, 5).detach(), draw(4, 3).detach()
    assert torch.autograd.gradcheck(lambda x, d, o: _Scaled.apply(x, a, b, d, o), (draw(2, 6, 5), draw(3), draw(4)))


def one(method: al.Method) -> Any:
    """The adapter of a model of one layer."""
    model = nn.Module()
    model.layer = nn.Linear(48, 40)
    return al.attach(model, method).adapters("default")["layer"]


def test_where_it_starts() -> None:
    """λ_d at `d_initial`, λ_b at zero, and bases that keep the size of what they multiply, up to √2."""
    layer = one(al.VeRA(r=64, targets=["layer"]))
    assert torch.equal(layer.d, torch.full((64,), 0.1))
    assert torch.equal(layer.b, torch.zeros(40))
    for base, size in ((layer.bases.A, 48), (layer.bases.B, 64)):
        assert base.abs().max() <= (6 / size) ** 0.5
        assert float(base.std()) == pytest.approx((2 / size) ** 0.5, rel=0.05)
    other = one(al.VeRA(r=4, d_initial=0.02, targets=["layer"]))
    assert torch.equal(other.d, torch.full((4,), 0.02))


DRAW, SLICES = al.VeRA.draw, al.VeRA.Layer.slices


def _unseeded(seed: int, drawn: Any = itertools.count()) -> torch.Generator:  # noqa: B008
    return seeded(next(drawn))


def _forward(change: Any) -> Mutation:
    return (al.VeRA.Layer, "forward", lambda self, x: change(x, *self.slices(), self.d, self.b))


BROKEN: dict[str, Mutation] = {
    "the seed not used": (vera, "seeded", _unseeded),
    "lambda_d starts at one": begun(al.VeRA.Layer, lambda layer, method: layer.d.fill_(1)),
    "lambda_b does not start at zero": begun(al.VeRA.Layer, lambda layer, method: layer.b.fill_(0.1)),
    "normal bases": (al.VeRA, "draw", lambda self, o, i: tuple(torch.randn_like(t) for t in DRAW(self, o, i))),
    "bases too small": (al.VeRA, "draw", lambda self, o, i: tuple(0.5 * t for t in DRAW(self, o, i))),
    "no lambda_d": _forward(lambda x, a, b, d, out: x @ a.T @ b.T * out),
    "no lambda_b": _forward(lambda x, a, b, d, out: (x @ a.T * d) @ b.T),
    "lambda_d squared": _forward(lambda x, a, b, d, out: (x @ a.T * d * d) @ b.T * out),
    "the last rows of B": (
        al.VeRA.Layer, "slices", lambda self: (SLICES(self)[0], self.bases.B[-self.site.shape[0] :])
    ),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_where_it_starts,
    functools.partial(test_the_formula_in_float64, "gpt2"),
    test_seed_and_vectors_are_enough,
    lines=BROKEN,
)
