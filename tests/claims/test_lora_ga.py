"""LoRA-GA's claim: the first step changes the weight along the best part of rank 2r of the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import AttachError, DataError
from adapterlab.methods.low_rank import lora_ga

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


def test_the_claim_fails_when_both_factors_have_the_same_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(g: Tensor, **options: Any) -> Any:
        u, s, vh = torch.linalg.svd(g, full_matrices=False)
        return torch.cat([u[:, :R], u[:, :R]], 1), s, vh.T

    monkeypatch.setattr(lora_ga.torch, "svd_lowrank", same)
    assert not holds()


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
