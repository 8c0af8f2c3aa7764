"""VeRA: the whole adapter is a seed and two vectors a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import adapterlab as al
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


def test_the_claim_fails_when_the_seed_is_not_used(
    tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = iter(range(100))
    seeded = "adapterlab.methods.structured.vera.seeded"
    monkeypatch.setattr(seeded, lambda seed: torch.Generator().manual_seed(next(drawn)))
    assert not measure(tiny, batch_for, randomise, logits, tmp_path / "a") < 1e-6


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
