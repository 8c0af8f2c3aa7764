"""SAID: a random projection of few numbers keeps norms and is enough to learn a task; its gradient is the true one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from scipy.linalg import hadamard
from torch import Tensor, nn
from torch.nn import functional as F

import adapterlab as al
from adapterlab.errors import AttachError
from adapterlab.methods.structured import intrinsic_said
from adapterlab.methods.structured.intrinsic_said import Fastfood, IntrinsicSAID


class Net(nn.Module):
    """Layers in a row, with room beside them for what adapters share."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def data() -> tuple[Tensor, Tensor]:
    """Eight noisy classes that a linear map of the input tells apart."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 8
    return torch.randn(8, 32, generator=draw)[labels] + 0.5 * torch.randn(256, 32, generator=draw), labels


def train(method: Any, steps: int = 150) -> tuple[float, int]:
    """(accuracy, trained parameters) of a small network."""
    torch.manual_seed(0)
    model = Net(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    x, labels = data()
    host = al.attach(model, method)
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.05)
    for _ in range(steps):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((model(x).argmax(-1) == labels).float().mean()), host.summary().trainable


def measure() -> tuple[float, float, float]:
    """Accuracy with 100 numbers, with 1 number beside the scales, and of full tuning of 1320."""
    few, count = train(IntrinsicSAID(d=100, targets=["body.0", "body.2"]))
    one, _ = train(IntrinsicSAID(d=5, targets=["body.0", "body.2"]))
    full, every = train(al.Full())
    assert (count, every) == (100, 1320)
    return few, one, full


def holds() -> bool:
    few, one, full = measure()
    return full > 0.95 and few >= 0.9 * full and one < 0.9 * full


def test_claim() -> None:
    assert holds()


def norm_ratio(size: int) -> float:
    """‖P(v)‖ / ‖v‖ for a random v of 200."""
    site = al.attach(nn.Sequential(nn.Linear(2, 2)), al.LoRA(r=1, targets=["0"])).adapters("default")["0"].site
    projection = intrinsic_said.Fastfood(size, 200, 3, site, keep=True)
    v = torch.randn(200, generator=torch.Generator().manual_seed(1))
    return float(projection(v).norm() / v.norm())


@pytest.mark.parametrize("size", [768, 2304, 1 << 16, 100_000])
def test_norms_are_kept(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(norm_ratio(size) - 1) < 0.1
    monkeypatch.setattr(intrinsic_said, "walsh_hadamard", lambda x: x)
    assert abs(norm_ratio(size) - 1) > 0.1


@pytest.mark.parametrize("size", [12, 16, 5])
def test_the_projection_is_the_product_of_its_five_matrices(size: int) -> None:
    """Dense in float64, v longer and shorter than the padded length."""
    site = al.attach(nn.Sequential(nn.Linear(2, 2)).double(), al.LoRA(r=1, targets=["0"])).adapters("default")["0"].site
    n = 8 if size == 5 else 16
    H = torch.tensor(hadamard(n), dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, (n,), generator=draw, dtype=torch.int8) * 2 - 1
    order = torch.randperm(n, generator=draw, dtype=torch.int32)
    G = torch.randn(n, generator=draw).double()
    for length in (3, n, 20):
        projection = intrinsic_said.Fastfood(size, length, 3, site, keep=True)
        v = torch.randn(length, dtype=torch.float64)
        padded = torch.cat([v, v.new_zeros(n)])[:n]
        permute = torch.eye(n, dtype=torch.float64)[order.long()]
        full = H @ G.diag() @ permute @ H @ signs.double().diag() @ padded
        expected = full[:size] / ((n * G.square().sum()).sqrt() * (size / n) ** 0.5)
        assert torch.allclose(projection(v), expected, atol=1e-6)


def gradient_error(host: Any, model: nn.Module) -> float:
    """Largest relative difference between the gradients of v and of all λ and central differences."""
    trained = host.parameters("default")
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        return model(x).sin().sum()

    grads = torch.autograd.grad(loss(), trained, allow_unused=True, materialize_grads=True)
    errors = []
    for p, found in zip(trained, grads, strict=True):
        differences = torch.zeros_like(p)
        with torch.no_grad():
            for i in range(len(p)):
                for sign in (1, -1):
                    p[i] += sign * 1e-5
                    differences[i] += sign * loss() / 2e-5
                    p[i] -= sign * 1e-5
        errors.append(float((found - differences).abs().max() / differences.abs().max()))
    return max(errors)


def test_the_gradient_is_the_true_one(randomise: Any) -> None:
    model = Net(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    host = al.attach(model, IntrinsicSAID(d=12, targets=["body.0", "body.2"]))
    randomise(host)
    assert gradient_error(host, model) < 1e-6


@pytest.mark.parametrize("aware", [True, False])
def test_each_tensor_has_its_own_projection_and_scale(aware: bool, randomise: Any) -> None:
    """W + λ P(v) and b + λ' P'(v), with λ = 1 at the start, and for good without `structure_aware`."""
    torch.manual_seed(0)
    model = Net(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    host = al.attach(model, IntrinsicSAID(d=20, structure_aware=aware, targets=["body.0", "body.1"]))
    v, layers = host.shared("default")["vector"].v, host.adapters("default")
    scales = [p for key, p in host.named_parameters("default").items() if p is not v]
    assert (len(v), len(scales)) == ((16, 4) if aware else (20, 0))
    assert all(torch.equal(scale, torch.ones_like(scale)) for scale in scales)
    randomise(host)
    x = torch.randn(5, 8, dtype=torch.float64)
    expected, seen = x, []
    for path, layer in layers.items():
        parts = [layer.weight_map(v), layer.bias_map(v)]
        seen.append(parts[0])
        factors = [layer.weight_scale, layer.bias_scale] if aware else [1.0, 1.0]
        weight = model.get_submodule(path).weight + factors[0] * parts[0].view(8, 8)
        expected = expected @ weight.T + model.get_submodule(path).bias + factors[1] * parts[1]
    assert torch.allclose(model(x), expected)
    assert (seen[0] - seen[1]).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classes", "t5"])
def test_starts_at_the_base_trains_and_merges(
    family: str, tiny: Any, batch_for: Any, logits: Any, randomise: Any
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    before = logits(model, batch)
    host = al.attach(model, IntrinsicSAID(d=300))
    assert torch.equal(logits(model, batch), before)
    assert host.summary().trainable == 300
    host.verify(batch)
    randomise(host)
    live = logits(model, batch)
    assert not torch.allclose(live, before, atol=1e-2)
    host.merge()
    assert torch.allclose(logits(model, batch), live, atol=1e-3)


def test_seed_and_values_are_all_that_is_stored(
    tiny: Any, batch_for: Any, logits: Any, randomise: Any, tmp_path: Path
) -> None:
    model = tiny("gpt2")
    host = al.attach(model, IntrinsicSAID(d=100, structure_aware=False, seed=5, keep_projections=False))
    randomise(host)
    host.save(tmp_path / "adapter")
    assert sum(t.numel() for t in host.tensors("default").values()) == 100
    again = al.load(tiny("gpt2"), tmp_path / "adapter")
    batch = batch_for(model)
    assert torch.equal(logits(again.model, batch), logits(model, batch))
    kept = al.attach(tiny("gpt2"), IntrinsicSAID(d=100, structure_aware=False, seed=5))
    kept.load_state_dict("default", host.tensors("default"))
    assert torch.equal(logits(kept.model, batch), logits(model, batch))


def test_a_tied_weight_has_one_projection(tiny: Any, randomise: Any) -> None:
    model = tiny("llama-tied")
    host = al.attach(model, IntrinsicSAID(d=50, targets=["embed", "head"]))
    assert host.summary().trainable == 50
    assert len(host.tensors("default")) == 2  # v and one scale
    randomise(host)
    table, head = host.adapters("default").values()
    assert torch.equal(table.delta().T, head.delta())
    ids = torch.tensor([[3, 4]])
    live = model(ids).logits
    host.merge(tied="untie")
    assert torch.allclose(model(ids).logits, live, atol=1e-4)


def test_too_few_values_for_the_scales_are_refused(tiny: Any) -> None:
    with pytest.raises(AttachError, match=r"d = 4 leaves nothing.*4 weights.*Choose d > 4.*structure_aware=False"):
        al.attach(tiny("llama"), IntrinsicSAID(d=4, targets=["q", "v"]))


PLAIN, FORWARD, TRANSFORM = Fastfood.forward, IntrinsicSAID.Layer.forward, intrinsic_said.walsh_hadamard


def _scaled_backward(x: Tensor) -> Tensor:
    """A backward pass scaled by 1/L, as some implementations have it."""
    small = TRANSFORM(x / len(x) ** 0.5)
    return small + (TRANSFORM(x) - small).detach()


def _project(change: Any) -> Mutation:
    v: Any = lambda self: self.vector.v  # noqa: E731
    return (IntrinsicSAID.Layer, "project", lambda self, projection, scale: change(projection, v(self), scale))


BROKEN: dict[str, Mutation] = {
    "one number for each tensor": (Fastfood, "forward", lambda self, v: PLAIN(self, torch.cat([v[:1], 0 * v[1:]]))),
    "the gradient scaled": (intrinsic_said, "walsh_hadamard", _scaled_backward),
    "no transform": (intrinsic_said, "walsh_hadamard", lambda x: x),
    "lambda dead": _project(lambda projection, v, scale: projection(v)),
    "lambda does not train": _project(
        lambda projection, v, scale: projection(v if scale is None else scale.detach() * v)
    ),
    "lambda squared": _project(lambda projection, v, scale: projection(v if scale is None else scale**2 * v)),
    "lambda added": _project(lambda projection, v, scale: projection(v if scale is None else scale - 1 + v)),
    "one projection for all": (intrinsic_said, "_seed", lambda seed, path: seed),
    "no update of biases": (IntrinsicSAID.Layer, "shift", lambda self: None),
    "lambda starts at zero": (intrinsic_said, "_one", lambda site: nn.Parameter(torch.zeros_like(site.parameter(1)))),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_each_tensor_has_its_own_projection_and_scale, True),
    functools.partial(test_the_projection_is_the_product_of_its_five_matrices, 12),
    test_the_gradient_is_the_true_one,
    test_claim,
    lines=BROKEN,
)
