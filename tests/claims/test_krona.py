"""KronA: full rank from few parameters; it fits Kronecker targets that LoRA with the same budget cannot."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import AttachError
from adapterlab.methods.structured import _kronecker, krona
from adapterlab.methods.structured.krona import KronA


def train(method: Any, update: Tensor, steps: int = 250) -> tuple[float, Tensor, int]:
    """Fit W + update on white inputs: (final loss / first, ΔW, trained parameters)."""
    torch.manual_seed(1)
    layer = nn.Linear(update.shape[1], update.shape[0], bias=False)
    weight = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    host = al.attach(model, method)
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.05)
    eye = torch.eye(update.shape[1])
    losses = []
    for _ in range(steps):
        loss = (model(eye) - (weight + update).T).square().sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return losses[-1] / losses[0], model(eye).T - weight, host.summary().trainable


def measure() -> tuple[float, float, int]:
    """(loss left by KronA, by LoRA with as many parameters, rank of KronA's update) for a Kronecker target."""
    draw = torch.Generator().manual_seed(0)
    target = torch.kron(torch.randn(12, 12, generator=draw), torch.randn(12, 12, generator=draw)) / 12
    ours, delta, count = train(KronA(targets=["0"]), target)
    lora, _, budget = train(al.LoRA(r=1, targets=["0"]), target)
    assert count == budget == 288
    return ours, lora, int(torch.linalg.matrix_rank(delta, rtol=1e-4))


def holds() -> bool:
    ours, lora, rank = measure()
    return ours < 0.01 and lora > 0.8 and rank == 144


def test_claim() -> None:
    assert holds()


@pytest.mark.parametrize("sizes", [None, (4, 15), (2, 3)])
def test_output_is_that_of_the_dense_product(sizes: tuple[int, int] | None, randomise: Any) -> None:
    """Row-major: W[i b1 + k, j b2 + l] = A[i, j] B[k, l]; entry by entry in float64."""
    model = nn.Sequential(nn.Linear(30, 8)).double()
    host = al.attach(model, KronA(a=sizes, scale=0.7, targets=["0"]))
    randomise(host)
    a, b = (host.adapters("default")["0"].get_parameter(key).detach() for key in "AB")
    dense = torch.zeros(8, 30, dtype=torch.float64)
    for o in range(8):
        for i in range(30):
            dense[o, i] = 0.7 * a[o // len(b), i // b.shape[1]] * b[o % len(b), i % b.shape[1]]
    x = torch.randn(2, 5, 30, dtype=torch.float64)
    expected = x @ (model[0].weight + dense).T + model[0].bias
    assert torch.allclose(model(x), expected, atol=1e-12)
    host.merge()
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_embeddings_look_columns_up(randomise: Any) -> None:
    model = nn.Sequential(nn.Embedding(35, 12))
    host = al.attach(model, KronA(a=(3, 5), targets=["0"]))
    randomise(host)
    ids = torch.arange(35).view(5, 7)
    live = model(ids)
    assert not torch.allclose(live, model[0].weight[ids], atol=0.01)
    host.merge()
    assert torch.allclose(model(ids), live, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classes", "t5", "mixtral"])
@pytest.mark.parametrize("place", ["block", "block_residual"])
def test_beside_the_feed_forward_sublayer(
    family: str, place: Any, tiny: Any, batch_for: Any, logits: Any, randomise: Any
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    before = logits(model, batch)
    host = al.attach(model, KronA(place=place))
    assert torch.equal(logits(model, batch), before)
    widths = [4 * 4 + 8 * 8] * (4 if family == "t5" else 2)  # 32 = 4 x 8
    assert host.summary().trainable == sum(widths) + len(widths) * (place == "block_residual")
    randomise(host)
    host.verify(batch)
    assert not torch.allclose(logits(model, batch), before, atol=1e-2)


def test_the_share_of_a_block_is_that_of_the_formula(randomise: Any, tiny: Any) -> None:
    model = tiny("llama")
    block = model.model.layers[0].mlp
    x = torch.randn(2, 3, 32)
    base = block(x)
    host = al.attach(model, KronA(place="block_residual", scale=0.5))
    randomise(host)
    layer = host.adapters("default")["model.layers.0.mlp"]
    a, b, t = (layer.get_parameter(key) for key in ("A", "B", "t"))
    assert torch.allclose(block(x), base + 0.5 * x @ torch.kron(a, b).T + t * x, atol=1e-5)


def test_trainable_count_is_the_formula(tiny: Any) -> None:
    host = al.attach(tiny("llama"), KronA())
    shapes = [a.site.shape for a in host.adapters("default").values()]
    splits = [(_kronecker.split(out), _kronecker.split(in_)) for out, in_ in shapes]
    assert host.summary().trainable == sum(a1 * a2 + b1 * b2 for (a1, b1), (a2, b2) in splits)


def test_sizes_that_do_not_divide_are_refused(tiny: Any) -> None:
    with pytest.raises(AttachError, match=r"a = \(5, 8\) does not divide .*\[32, 32\]; a = \(1, 8\) does"):
        al.attach(tiny("llama"), KronA(a=(5, 8), targets=["q"]))
    with pytest.raises(AttachError, match=r"place='block' .*targets=\['q'\] has no meaning"):
        al.attach(tiny("llama"), KronA(place="block", targets=["q"]))


def test_where_it_starts() -> None:
    torch.manual_seed(0)
    layer: Any = al.attach(nn.Sequential(nn.Linear(900, 400)), KronA(targets=["0"])).adapters("default")["0"]
    assert layer.A.shape == (20, 30)
    assert 0.9 / 30**0.5 < layer.A.abs().max() <= 1 / 30**0.5
    assert float(layer.A.std()) == pytest.approx(1 / 90**0.5, rel=0.1)
    assert not layer.B.any()


LAYER, SIDES, LINEAR = KronA.Layer, KronA.Layer.sides, _kronecker.kronecker_linear
COLUMNS = _kronecker.kronecker_columns
BROKEN: dict[str, Mutation] = {
    "A left out": (LAYER, "sides", lambda self: ((torch.ones_like(self.A),), SIDES(self)[1])),
    "B left out": (LAYER, "sides", lambda self: (SIDES(self)[0], (torch.ones_like(self.B),))),
    "B times A": (LAYER, "sides", lambda self: SIDES(self)[::-1]),
    "s left out": begun(LAYER, lambda layer, method: setattr(layer, "scale", 1.0)),
    "s left out of the merge": (LAYER, "delta", lambda self: torch.kron(self.A, self.B)),
    "s left out beside a block": begun(krona.Beside, lambda layer, method: setattr(layer, "scale", 1.0)),
    "B times A beside a block": (krona, "kronecker_linear", lambda x, a, b: x @ torch.kron(b[0], a[0]).T),
    "columns of an embedding exchanged": (
        _kronecker, "kronecker_columns", lambda ids, a, b: COLUMNS(ids.flip(-1), a, b)
    ),
    "B does not start at zero": begun(LAYER, lambda layer, method: layer.B.fill_(0.1)),
    "A starts at zero": begun(LAYER, lambda layer, method: layer.A.zero_()),
    "A starts normal": begun(LAYER, lambda layer, method: layer.A.normal_(std=1 / 90**0.5)),
    "all of it in A": (KronA, "sizes", lambda self, out, in_: ((out, in_), (1, 1))),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_output_is_that_of_the_dense_product, (2, 3)),
    test_the_share_of_a_block_is_that_of_the_formula,
    test_embeddings_look_columns_up,
    test_where_it_starts,
    lines=BROKEN,
)
