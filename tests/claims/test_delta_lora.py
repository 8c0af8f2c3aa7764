"""Delta-LoRA: the run is that of the written algorithm, which changes W in every step; the total has rank 2r."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import ConfigError, NotTrainingError
from adapterlab.methods.schedule.delta_lora import DeltaLoRA

WIDTH, R, START, STEPS, PUSH = 16, 2, 5, 200, 2.0


def task() -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    x = torch.randn(64, WIDTH)
    return model, x, x @ torch.randn(WIDTH, WIDTH).T


def ours() -> tuple[Tensor, Tensor, Any]:
    """The weight as merged, the start of A, and the base weight."""
    model, x, target = task()
    method = al.DeltaLoRA(r=R, alpha=R, push=PUSH, start=START, targets=["0"])
    host = al.attach(model, method)
    layer: Any = host.adapters("default")["0"]
    a = layer.A.detach().clone()
    optimizer = torch.optim.SGD(host.parameters("default"), lr=0.02, momentum=0.5)
    for step in range(STEPS):
        method.before_step(host, "default", step, optimizer)
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        method.after_step(host, "default", step, optimizer)
    base = model[0].weight.detach().clone()
    host.merge()
    return model[0].weight.detach(), a, base


def written(a: Tensor) -> Tensor:
    """The algorithm as the paper writes it, with a weight that really changes."""
    model, x, target = task()
    w = model[0].weight.detach().clone()
    a, b = a.clone().requires_grad_(), torch.zeros(WIDTH, R, requires_grad=True)
    optimizer = torch.optim.SGD([a, b], lr=0.02, momentum=0.5)
    for t in range(1, STEPS + 1):
        optimizer.zero_grad()
        (x @ (w + b @ a).T - target).square().mean().backward()
        before = (b @ a).detach()
        optimizer.step()
        if t > START:
            w += PUSH * ((b @ a).detach() - before)
    return w + (b @ a).detach()


def measure() -> tuple[float, int]:
    """Largest difference to the written algorithm; numerical rank of the total change."""
    merged, a, base = ours()
    change = torch.linalg.svdvals((merged - base).double())
    return float((merged - written(a)).abs().max()), int((change > 1e-5 * change[0]).sum())


def holds() -> bool:
    apart, rank = measure()
    return apart < 1e-4 and rank <= 2 * R


def test_it_is_the_written_algorithm() -> None:
    assert holds()


def test_gradients_are_those_of_lora(randomise: Any) -> None:
    model, x, target = task()
    host = al.attach(model, al.DeltaLoRA(r=R, alpha=2 * R, push=PUSH, targets=["0"]))
    layer: Any = host.adapters("default")["0"]
    nn.init.normal_(layer.B)
    layer.anchor(PUSH)
    with torch.no_grad():
        layer.A.add_(0.3)
        layer.B.mul_(1.5)
    s, fixed = layer.scale, PUSH * layer.scale * (layer.B @ layer.A - layer.B_kept @ layer.A_kept).detach()
    expected = x @ (model[0].weight + fixed + s * layer.B @ layer.A).T
    assert torch.allclose(model(x), expected, atol=1e-4)
    wanted = torch.autograd.grad((expected - target).square().sum(), (layer.A, layer.B))
    found = torch.autograd.grad((model(x) - target).square().sum(), (layer.A, layer.B))
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_dropout_is_refused() -> None:
    with pytest.raises(ConfigError, match="dropout"):
        al.DeltaLoRA(dropout=0.1)


def test_a_start_behind_the_end_is_refused() -> None:
    host = al.attach(task()[0], al.DeltaLoRA(start=20, targets=["0"]))
    method, optimizer = host.methods["default"], torch.optim.SGD(host.parameters("default"), lr=0.1)
    with pytest.raises(ConfigError, match=r"start=20 leaves none of this run's 20 steps.*start of 0 to 19"):
        method.begin(host, "default", 20)
    method.begin(host, "default", 21)
    method.before_step(host, "default", 20, optimizer)
    share = al.attach(task()[0], al.DeltaLoRA(start=0.5, targets=["0"]))
    layer: Any = share.adapters("default")["0"]
    with pytest.raises(NotTrainingError, match=r"start=0\.5, a share.*begin\(host, 'default', steps\)"):
        share.methods["default"].before_step(share, "default", 0, optimizer)
    share.methods["default"].begin(share, "default", 9)
    for step, pushed in ((3, 0), (4, 2)):
        share.methods["default"].before_step(share, "default", step, optimizer)
        assert layer.pushed == pushed
    method.begin(host, "default", 5)  # of a second run: the weight follows from its first step


def test_start_and_count(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("gpt2")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.DeltaLoRA(r=4))
    assert torch.equal(logits(model, batch), base)
    assert host.summary().trainable == sum(4 * sum(a.site.shape) for a in host.adapters("default").values())


BEFORE, ANCHOR, FACTORS = DeltaLoRA.before_step, DeltaLoRA.Layer.anchor, DeltaLoRA.Layer.factors


def _attached(self: Any) -> tuple[Tensor, Tensor]:
    b = (1 + self.pushed) * self.B
    return torch.cat([self.A, self.A_kept]), torch.cat([b, -self.pushed * self.B_kept], 1)


def _shifted(by: int) -> Mutation:
    return (DeltaLoRA, "before_step", lambda self, host, name, step, opt: BEFORE(self, host, name, step + by, opt))


def _from_zero(self: Any, push: float) -> None:
    ANCHOR(self, push)
    self.B_kept.zero_()


def _again(self: Any, push: float) -> None:
    self.pushed.zero_()
    ANCHOR(self, push)


def _grown(self: Any) -> tuple[Tensor, Tensor]:
    """The gradient of A not divided by 1 + λ."""
    return torch.cat([self.A, self.A_kept]), FACTORS(self)[1]


LAYER = DeltaLoRA.Layer
BROKEN: dict[str, Mutation] = {
    "the push gets a gradient": (LAYER, "factors", _attached),
    "the gradient of A grows": (LAYER, "factors", _grown),
    "it begins a step late": _shifted(-1),
    "it begins a step early": _shifted(1),
    "never pushed": (LAYER, "anchor", lambda self, push: None),
    "half the push": (LAYER, "anchor", lambda self, push: ANCHOR(self, push / 2)),
    "the product pushed, not its change": (LAYER, "anchor", _from_zero),
    "the anchor moves": (LAYER, "anchor", _again),
    "the push without s": (LAYER, "anchor", lambda self, push: ANCHOR(self, push / self.scale)),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_gradients_are_those_of_lora, test_it_is_the_written_algorithm, lines=BROKEN
)
