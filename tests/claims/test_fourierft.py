"""FourierFT: full rank from few numbers, where LoRA with as many has rank 2."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import AttachError
from adapterlab.methods.structured import fourierft
from adapterlab.methods.structured.fourierft import FourierFT


def measure(randomise: Any) -> tuple[int, int]:
    """(rank of FourierFT's update, of LoRA's) with 256 numbers on 64 x 64."""
    ranks = []
    for method in (FourierFT(n=256, targets=["0"]), al.LoRA(r=2, targets=["0"])):
        model = nn.Sequential(nn.Linear(64, 64, bias=False)).double()
        host = al.attach(model, method)
        randomise(host)
        assert host.summary().trainable == 256
        with torch.no_grad():
            update = model(torch.eye(64, dtype=torch.float64)).T - model[0].weight
        ranks.append(int(torch.linalg.matrix_rank(update)))
    return ranks[0], ranks[1]


def test_claim(randomise: Any) -> None:
    assert measure(randomise) == (64, 2)


@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (8, 5), (1, 4), (9, 1)])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_update_is_the_real_part_of_the_full_transform(shape: tuple[int, int], share: float) -> None:
    """As a matrix and applied. At full share every place is taken, those that are their own mirror image too."""
    out, in_ = shape
    n = max(1, int(share * out * in_))
    host = al.attach(nn.Sequential(nn.Linear(in_, out)).double(), FourierFT(n=n, alpha=3, seed=4, targets=["0"]))
    layer = host.adapters("default")["0"]
    places = torch.randperm(out * in_, generator=torch.Generator().manual_seed(4))[:n]
    full = torch.zeros(out * in_, dtype=torch.float64).index_put((places,), layer.spectrum)
    expected = 3 * torch.fft.ifft2(full.view(out, in_)).real
    assert torch.allclose(layer.delta(), expected, atol=1e-12)
    seed = torch.randn_like(expected)
    (found,) = torch.autograd.grad(layer.delta(), layer.spectrum, seed)
    (wanted,) = torch.autograd.grad(expected, layer.spectrum, seed, retain_graph=True)
    assert torch.allclose(found, wanted, atol=1e-12)
    for tokens in (1, 60):  # by transforms of the tokens, and by the matrix
        x = torch.randn(tokens, in_, dtype=torch.float64)
        assert torch.allclose(layer(x), x @ expected.T, atol=1e-12)
        upper = torch.randn(tokens, out, dtype=torch.float64)
        (found,) = torch.autograd.grad(layer(x), layer.spectrum, upper)
        (wanted,) = torch.autograd.grad(x @ expected.T, layer.spectrum, upper, retain_graph=True)
        assert torch.allclose(found, wanted, atol=1e-12)


def test_starts(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("llama")
    batch = batch_for(model)
    before = logits(model, batch)
    host = al.attach(model, FourierFT(n=50, start="zeros"))
    assert torch.equal(logits(model, batch), before)
    host.verify(batch)
    host.detach("default")
    host = al.attach(model, FourierFT(n=50))
    values = torch.cat([p.detach() for p in host.parameters("default")])
    assert abs(values.mean()) < 0.2
    assert abs(values.std() - 1) < 0.2


def test_too_many_values_for_a_layer_are_refused(tiny: Any) -> None:
    with pytest.raises(AttachError, match=r"k_proj has 16 x 32 = 512 frequencies, fewer than n = 1000.*n_pattern"):
        al.attach(tiny("llama"), FourierFT(targets=["q", "k"]))
    host = al.attach(tiny("llama"), FourierFT(targets=["q", "k"], n_pattern={"k_proj": 512}))
    assert host.summary().trainable == 2 * (1000 + 512)


def test_the_places_are_those_of_the_seed_and_the_shape(tiny: Any) -> None:
    """The same in layers of one shape, others with another seed; the draw is that of the files of HF PEFT."""
    found = []
    for seed in (1, 1, 2):
        layers = al.attach(tiny("llama"), FourierFT(n=50, seed=seed, targets=["q", "v"])).adapters("default")
        targets: list[Any] = [layer.entries("row").places for layer in layers.values()]
        assert torch.equal(targets[0], targets[2])
        found.append(targets[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


LAYER, DELTA, FORWARD, PLACES = FourierFT.Layer, FourierFT.Layer.delta, FourierFT.Layer.forward, fourierft.places
ENTRIES, PRODUCT = fourierft.symmetric_entries, fourierft.spectral_product


def _half_mirrored(flat: Tensor, out: int, in_: int) -> Any:
    """The mirror image in the columns alone."""
    rows, columns = ENTRIES(flat, out, in_)
    return rows._replace(places=-rows.places % in_), columns


def _transposed(out: int, in_: int, n: int, seed: int) -> Tensor:
    found = PLACES(out, in_, n, seed)
    return found // in_ + found % in_ * out


BROKEN: dict[str, Mutation] = {
    "places not spread": (fourierft, "places", lambda out, in_, n, seed: torch.arange(n)),
    "places of another seed": (fourierft, "places", lambda out, in_, n, seed: PLACES(out, in_, n, seed + 1)),
    "the seed ignored": (fourierft, "places", lambda out, in_, n, seed: PLACES(out, in_, n, 4)),
    "places of the transpose": (fourierft, "places", _transposed),
    "columns mirrored alone": (fourierft, "symmetric_entries", _half_mirrored),
    "applied with the other sign": (fourierft, "spectral_product", lambda x, v, *entries: PRODUCT(x, -v, *entries)),
    "alpha left out": (LAYER, "delta", lambda self: DELTA(self) / self.alpha),
    "alpha left out where it is applied": (LAYER, "forward", lambda self, x: FORWARD(self, x) / self.alpha),
    "the root of the size": (LAYER, "delta", lambda self: DELTA(self) * (self.shape[0] * self.shape[1]) ** 0.5),
    "values start uniform": begun(LAYER, lambda layer, method: layer.spectrum.uniform_(-1, 1)),
    "values start at zero": begun(LAYER, lambda layer, method: layer.spectrum.zero_()),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_the_update_is_the_real_part_of_the_full_transform, (6, 8), 0.5),
    test_the_places_are_those_of_the_seed_and_the_shape,
    test_starts,
    test_claim,
    lines=BROKEN,
)
