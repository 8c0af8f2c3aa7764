"""LoRA-GA's claim: the first step changes the weight along the best part of rank 2r of the gradient."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import AttachError, DataError
from adapterlab.methods.low_rank import _shown_data, lora_ga
from adapterlab.methods.low_rank._factors import Factors
from adapterlab.methods.low_rank._starts import Start
from adapterlab.methods.low_rank.lora_ga import LoRAGA, LoRAGAStart

OUT, IN, R = 40, 32, 4


class Net(nn.Module):
    """The gradient of its loss is labelsᵀ x, of rank 8."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return type("Output", (), {"loss": (self.layer(x) * labels).sum()})


def batches() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [
        {"x": torch.randn(2, IN, generator=draw), "labels": torch.randn(2, OUT, generator=draw)}
        for _ in range(2 * R // 2)
    ]


def measure(method: Any) -> float:
    """The cosine between the change of s · B A in a first small step and the gradient."""
    torch.manual_seed(0)
    model = Net()
    host = al.attach(model, method)
    method.prepare(host, "default", batches())
    layer: Any = host.adapters("default")["layer"]
    before = layer.delta().detach()
    torch.stack([model(**batch).loss for batch in batches()]).mean().backward()
    gradient = sum(b["labels"].T @ b["x"] for b in batches())
    with torch.no_grad():
        for p in (layer.A, layer.B):
            p -= 1e-5 * p.grad
    change = (before - layer.delta().detach()).double().flatten()
    return float(torch.cosine_similarity(change, gradient.double().flatten(), dim=0))


def ours(**options: Any) -> Any:
    return al.LoRAGA(r=R, targets=["layer"], init={"name": "lora_ga", **options})


def holds() -> bool:
    return measure(ours()) > 0.99


def test_the_first_step_follows_the_gradient() -> None:
    assert holds()
    assert measure(al.LoRA(r=R, targets=["layer"])) < 0.6


@pytest.mark.parametrize("direction", ["A2rBr", "ArBr"])
def test_so_it_does_with_other_shares_of_the_vectors(direction: str) -> None:
    assert measure(ours(direction=direction)) > 0.99


def test_sizes_and_the_start(tiny: Any, batch_for: Any, logits: Any) -> None:
    for size, a_norm in (("stable", OUT**0.25 / 4), ("unit", 1.0), ("gradient", 1.0)):
        model = Net()
        host = al.attach(model, ours(size=size))
        weight = model.layer.weight.detach().clone()
        host.methods["default"].prepare(host, "default", batches())
        layer: Any = host.adapters("default")["layer"]
        assert torch.allclose(layer.A.norm(dim=1), torch.full((R,), a_norm), atol=1e-5)
        assert torch.allclose(model.layer.weight + layer.delta(), weight, atol=1e-4)
    model = tiny("gpt2")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.LoRAGA(r=4))
    host.methods["default"].prepare(host, "default", [batch])
    assert (logits(model, batch) - base).abs().max() < 1e-4
    assert not any(p.requires_grad or p.grad is not None for n, p in model.named_parameters() if "_adapters" not in n)
    assert all(p.requires_grad and p.grad is None for p in host.parameters("default"))
    assert host.summary().trainable == sum(4 * sum(a.site.shape) for a in host.adapters("default").values())


def test_the_gradient_is_the_mean_over_batches(tiny: Any, batch_for: Any) -> None:
    from adapterlab.methods.low_rank._shown_data import mean_gradients

    model = tiny("gpt2")
    host = al.attach(model, ours(size="unit").replace(targets=["qkv"]))
    places = {p: host.methods["default"].place(a.site) for p, a in host.adapters("default").items()}
    given = [batch_for(model, seed=s) for s in (1, 2)]
    found = mean_gradients(host, places, given)
    plain = tiny("gpt2")
    (sum(plain(**batch).loss for batch in given) / 2).backward()
    for path, gradient in found.items():
        assert torch.allclose(gradient, plain.get_submodule(path).weight.grad.T, atol=1e-5)


def test_what_cannot_be_is_refused(tiny: Any, batch_for: Any) -> None:
    with pytest.raises(AttachError, match="r=20"):
        al.attach(tiny("llama"), al.LoRAGA(r=20))
    host = al.attach(tiny("llama"), al.LoRAGA(r=2))
    batch = {k: v for k, v in batch_for(host.model).items() if k != "labels"}
    with pytest.raises(DataError, match="labels"):
        host.methods["default"].prepare(host, "default", [batch])


def test_the_factors_are_singular_vectors_of_the_gradient() -> None:
    """A the first r of the inputs, B the next r of the outputs, of length out^¼ / √gamma; s is alpha / √r."""
    gradient = sum(b["labels"].T @ b["x"] for b in batches()).double() / len(batches())
    u, s, vh = torch.linalg.svd(gradient)
    length = OUT**0.25 / 2
    for size, a_size, b_sizes in (
        ("stable", length, torch.full((R,), length)), ("unit", 1.0, torch.ones(R)),
        ("gradient", 1.0, length * s[R : 2 * R]),
    ):  # fmt: skip
        host = al.attach(Net(), ours(size=size, gamma=4.0))
        host.methods["default"].prepare(host, "default", batches())
        layer: Any = host.adapters("default")["layer"]
        assert layer.scale == 8.0
        for found, wanted in ((layer.A, a_size * vh[:R]), (layer.B.T, b_sizes[:, None] * u[:, R : 2 * R].T)):
            signs = torch.where((found * wanted).sum(1) > 0, 1.0, -1.0)[:, None]
            assert torch.allclose(found.double(), signs * wanted, atol=1e-3 * float(wanted.abs().max()))


def test_dropout_is_off_while_it_looks() -> None:
    found = []
    for training in (True, False):
        torch.manual_seed(0)
        model = Net()
        model.layer = nn.Sequential(nn.Dropout(0.5), nn.Linear(IN, OUT))
        host = al.attach(model.train(training), ours().replace(targets=["layer.1"]))
        host.methods["default"].prepare(host, "default", batches())
        found.append(host.adapters("default")["layer.1"].delta())
        assert model.layer[0].training == training
    assert torch.allclose(*found, atol=1e-5)


ALIGNED, PLACE, MEAN = LoRAGAStart.aligned, LoRAGA.place, _shown_data.mean_gradients


def _one_base(self: Any, place: Any, gradient: Tensor) -> Start:
    start = ALIGNED(self, place, gradient)
    return Start(start.A, torch.linalg.svd(gradient)[0][:, :R] * start.B.norm(dim=0), start.taken)


def _lengths(a: float, b: float) -> Mutation:
    def changed(self: Any, place: Any, gradient: Tensor) -> Start:
        start = ALIGNED(self, place, gradient)
        return Start(a * start.A, b * start.B, (a * start.A, b * start.B))

    return (LoRAGAStart, "aligned", changed)


def _linear(self: Any, site: Any) -> Any:
    place = PLACE(self, site)
    return type(place)(site, place.r, self.alpha / place.r)


BROKEN: dict[str, Mutation] = {
    "both factors of the same vectors": (LoRAGAStart, "aligned", _one_base),
    "directions of noise": (LoRAGAStart, "aligned", lambda self, p, g: ALIGNED(self, p, torch.randn_like(g))),
    "the first batch alone": (lora_ga, "mean_gradients", lambda host, p, b: MEAN(host, p, list(b)[:1])),
    "in to the quarter in place of out to the quarter": _lengths((IN / OUT) ** 0.25, (IN / OUT) ** 0.25),
    "gamma in place of its root": _lengths(0.5, 0.5),
    "length of A alone wrong": _lengths(2.0, 1.0),
    "alpha / r": (LoRAGA, "place", _linear),
    "the base keeps all": (Factors, "settle", lambda self, host, name: None),
    "dropout on while it looks": (_shown_data, "dropout_off", contextlib.nullcontext),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_the_first_step_follows_the_gradient,
    test_the_factors_are_singular_vectors_of_the_gradient,
    test_sizes_and_the_start,
    test_dropout_is_off_while_it_looks,
    lines=BROKEN,
)
