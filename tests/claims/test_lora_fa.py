"""LoRA-FA: the layer keeps r numbers a token, B's gradient is LoRA's, and ΔW stays in the row space of A."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.engine import fusion
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.low_rank.lora_fa import LoRAFA, Projected
from adapterlab.optim import adamw

IN, OUT, R = 256, 64, 8


def one(method: Any, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).to(dtype)
    host = al.attach(model, method)
    layer: Any = host.adapters("default")["0"]
    nn.init.normal_(layer.B)
    return model, host, layer


def held(model: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """Bytes that the forward pass keeps beside the parameters and buffers; and the output."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return sum(kept.values()), y


def measure() -> float:
    """Bytes kept for one layer, as a share of LoRA's."""
    x = torch.randn(512, IN)
    return held(one(al.LoRAFA(r=R))[0], x)[0] / held(one(al.LoRA(r=R))[0], x)[0]


@pytest.mark.parametrize("fused", [True, False])
def test_the_input_is_not_kept(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(fusion, "may_fuse", lambda adapter, x: False)
    assert measure() < 2 * R / IN + 0.05


def test_the_gradient_of_b_is_loras() -> None:
    grads = []
    for method in (al.LoRAFA(r=R), al.LoRA(r=R)):
        model, _, layer = one(method)
        model(torch.ones(3, IN)).square().sum().backward()
        grads.append(layer.B.grad)
    assert torch.equal(*grads)


def full_gradient(model: Any, layer: Any, x: Tensor) -> Tensor:
    w = (model[0].weight + layer.delta()).detach().requires_grad_()
    (x @ w.T + model[0].bias).pow(3).sum().backward()
    assert w.grad is not None
    return w.grad


def test_the_projected_step_is_the_closest_to_the_full_gradient() -> None:
    def apart() -> float:
        model, _, layer = one(al.LoRAFA(r=R, alpha=24, projected=True), torch.float64)
        x = torch.randn(16, IN, dtype=torch.float64)
        model(x).pow(3).sum().backward()
        transform = Projected(layer)
        step, _ = transform.update(layer.B.grad, transform.init(layer.B.grad), layer.B)
        basis = torch.linalg.qr(layer.A.T)[0]
        wanted = full_gradient(model, layer, x) @ basis @ basis.T
        return float((layer.scale * step @ layer.A - wanted).norm() / wanted.norm())

    assert apart() < 1e-5


@pytest.mark.parametrize("projected", [False, True])
def test_training_stays_in_the_row_space_and_moves_b_alone(projected: bool) -> None:
    method = al.LoRAFA(r=4, projected=projected)
    model, host, layer = one(method)
    a, b = layer.A.clone(), layer.B.detach().clone()
    optimizer = method.optimizer(host, "default", lambda p: adamw(p, lr=0.01, weight_decay=0.1))
    for _ in range(3):
        model(torch.randn(8, IN)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(layer.A, a)
    assert (layer.B - b).abs().min() > 0
    basis = torch.linalg.qr(a.T)[0]
    delta = layer.delta()
    assert (delta - delta @ basis @ basis.T).abs().max() < 1e-4 * delta.abs().max()


@pytest.mark.parametrize(("family", "targets"), [("llama", "all-linear"), ("gpt2", "all-linear"), ("llama", "embed")])
def test_start_count_and_effect(family: str, targets: str, tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.LoRAFA(r=4, targets=[targets]))
    assert torch.equal(logits(model, batch), base)
    assert host.summary().trainable == sum(4 * a.site.shape[0] for a in host.adapters("default").values())
    host.verify(batch)
    with torch.no_grad():
        for p in host.parameters("default"):
            p.fill_(0.5)
    assert (logits(model, batch) - base).abs().max() > 1e-3


INVERSE = Projected.init


def _projected(change: Any) -> Mutation:
    """Another matrix in place of the inverse of s² A Aᵀ."""
    return (Projected, "init", lambda self, g: {"inverse": change(INVERSE(self, g)["inverse"], self.layer.scale)})


LAYER = LoRAFA.Layer
BROKEN: dict[str, Mutation] = {
    "A trains": (LoRAFA, "Layer", LoRA.Layer),
    "A moves": (LAYER, "factors", lambda self: (self.A + self.B.detach().mean(), self.B)),
    "A is zero": begun(LAYER, lambda layer, method: layer.A.zero_()),
    "B does not start at zero": begun(LAYER, lambda layer, method: layer.B.fill_(0.1)),
    "s left out": (LoRAFA, "scaling", lambda self, path: 1.0),
    "no inverse": _projected(lambda inverse, s: torch.eye(len(inverse), dtype=inverse.dtype)),
    "the inverse without s": _projected(lambda inverse, s: inverse * s**2),
    "the inverse with one s": _projected(lambda inverse, s: inverse * s),
    "the diagonal of the inverse": _projected(lambda inverse, s: inverse.diag().diag()),
    "the Gram matrix itself": _projected(lambda inverse, s: torch.linalg.inv(inverse)),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_start_count_and_effect, "llama", "all-linear"),
    test_the_gradient_of_b_is_loras,
    test_the_projected_step_is_the_closest_to_the_full_gradient,
    functools.partial(test_training_stays_in_the_row_space_and_moves_b_alone, False),
    functools.partial(test_the_input_is_not_kept, True),
    lines=BROKEN,
)
