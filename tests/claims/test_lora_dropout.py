"""LoRA Dropout: draws have the mean (1 − p)² B A x, and an ensemble of N of them 1/√N of the spread."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.methods.low_rank.lora_dropout import LoRADropout


def one(**fields: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    nn.init.zeros_(model[0].weight)
    host = al.attach(model, al.LoRADropout(r=4, targets=["0"], **fields))
    layer: Any = host.adapters("default")["0"]
    nn.init.normal_(layer.B)
    return model, host, layer


def measure() -> tuple[float, float]:
    """Mean of the draws as a share of B A x; spread of one draw over that of an ensemble of 16."""
    model, host, layer = one(p=0.5)
    x = torch.randn(2, 32)
    full = (layer.scale * x @ layer.A.T @ layer.B.T).detach()
    method = host.methods["default"]
    with torch.no_grad(), method.masked(host, "default"):
        single = torch.stack([model(x) for _ in range(3200)])
    many = single.view(200, 16, 2, 32).mean(1)
    share = float((single.mean(0) * full).sum() / full.square().sum())
    return share, float(single.std(0).mean() / many.std(0).mean())


def holds() -> bool:
    share, ratio = measure()
    return abs(share / 0.25 - 1) < 0.05 and abs(ratio / 4 - 1) < 0.15


def test_mean_and_spread_of_the_draws() -> None:
    assert holds()


def test_a_draw_is_shared_by_all_tokens_and_spares_the_ranks() -> None:
    model, _, layer = one(p=0.5)
    model.train()
    draws = []
    for _ in range(2):
        found = model(torch.eye(32)).T  # the update with deleted rows and columns
        deleted = found == 0
        rows, columns = deleted.all(1), deleted.all(0)
        assert 0 < rows.sum() < 32
        assert torch.equal(deleted, rows[:, None] | columns[None])
        kept = layer.scale * layer.B @ layer.A
        assert torch.allclose(found, torch.where(deleted, 0.0, kept), atol=1e-5)
        draws.append(rows)
    assert not torch.equal(*draws)


def test_a_rescaled_draw_keeps_the_mean() -> None:
    """Each mask divides what it leaves by its probability."""
    model, _, layer = one(p=0.3, rescale=True)
    found = model.train()(torch.eye(32)).T.detach()
    kept = found != 0
    assert torch.allclose(found[kept], (layer.scale * layer.B @ layer.A / 0.49)[kept], atol=1e-4)
    assert 0.3 < kept.double().mean() < 0.7


@pytest.mark.parametrize(("rescale", "factor"), [(False, 0.49), (True, 1.0)])
def test_outside_of_training_the_mean_is_used_and_merged(rescale: bool, factor: float) -> None:
    model, host, layer = one(p=0.3, rescale=rescale)
    model.eval()
    x = torch.randn(3, 32)
    expected = factor * layer.scale * x @ layer.A.T @ layer.B.T
    assert torch.allclose(model(x), expected, atol=1e-5)
    host.merge()
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_the_ensemble_averages_draws() -> None:
    model, host, _ = one(p=0.5, draws=3)
    method, x = host.methods["default"], torch.randn(1, 32)
    model.eval()
    torch.manual_seed(4)
    found = method.ensemble(host, "default", lambda: model(x))
    torch.manual_seed(4)
    with method.masked(host, "default"):
        assert torch.allclose(found, (model(x) + model(x) + model(x)) / 3)
    assert torch.equal(model(x), model(x)), "the masks are off again"


def test_a_step_averages_the_losses_of_its_draws() -> None:
    model, host, layer = one(p=0.5, draws=3)
    x = torch.randn(4, 32)
    values: list[Tensor] = []

    def loss() -> Tensor:
        values.append(model(x).square().mean())
        return values[-1]

    found = host.methods["default"].gradient(host, "default", loss, lambda value: value.backward())
    assert len({float(v) for v in values}) == 3, "each draw is its own"
    assert torch.allclose(found, torch.stack(values).mean())
    grad = layer.B.grad.clone()
    layer.B.grad = None
    torch.manual_seed(9)
    host.methods["default"].gradient(host, "default", loss, lambda value: value.backward())
    torch.manual_seed(9)
    wanted = torch.autograd.grad(sum(model(x).square().mean() for _ in range(3)) / 3, layer.B)[0]
    assert torch.allclose(layer.B.grad, wanted, atol=1e-6)
    assert not torch.equal(grad, wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_start_count_and_checkpointing(family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.LoRADropout(r=4))
    assert torch.equal(logits(model, batch), base)
    assert host.summary().trainable == sum(4 * sum(a.site.shape) for a in host.adapters("default").values())
    randomise(host)
    model.train()
    grads = []
    for recompute in ("none", "cheap", "full"):
        host.recompute(recompute)
        torch.manual_seed(3)
        model(**batch).loss.backward()
        grads.append([p.grad.clone() for p in host.parameters("default")])
        model.zero_grad()
    for again in grads[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads[0], again, strict=True))


LAYER, MASK, FACTORS = LoRADropout.Layer, LoRADropout.Layer._mask, LoRADropout.Layer.factors
GRADIENT = LoRADropout.gradient


def _ranks(self: Any) -> tuple[Tensor, Tensor]:
    return self.A * (torch.rand(len(self.A)) >= 0.5)[:, None], self.B


def _elements(self: Any) -> tuple[Tensor, Tensor]:
    return self.A * (torch.rand_like(self.A) >= 0.5), self.B * (torch.rand_like(self.B) >= 0.5)


def _columns_alone(self: Any) -> tuple[Tensor, Tensor]:
    return (FACTORS(self)[0], self.B) if self.training or self.masks else FACTORS(self)


def _summed(self: Any, host: Any, name: str, loss: Any, backward: Any) -> Tensor:
    values = [loss() for _ in range(self.draws)]
    for value in values:
        backward(value)
    return torch.stack(values).detach().sum() / self.draws


BROKEN: dict[str, Mutation] = {
    "ranks dropped": (LAYER, "factors", _ranks),
    "entries dropped": (LAYER, "factors", _elements),
    "columns of A alone": (LAYER, "factors", _columns_alone),
    "kept with probability p": (LAYER, "_mask", lambda self, size: 1 - MASK(self, size)),
    "always rescaled": begun(LAYER, lambda layer, method: setattr(layer, "gain", 1 / (1 - method.p))),
    "never rescaled": begun(LAYER, lambda layer, method: setattr(layer, "gain", 1.0)),
    "the mean of one mask": (LoRADropout, "kept", property(lambda self: 1 - self.p)),
    "all of it outside of training": (LoRADropout, "kept", property(lambda self: 1.0)),
    "one draw for the ensemble": (
        LoRADropout, "ensemble", lambda self, host, name, compute, draws=None: compute()
    ),
    "gradients of draws added up": (LoRADropout, "gradient", _summed),
    "one draw for a step": (LoRADropout, "gradient", lambda self, *given: GRADIENT(self.replace(draws=1), *given)),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_outside_of_training_the_mean_is_used_and_merged, False, 0.49),
    test_the_ensemble_averages_draws,
    test_a_step_averages_the_losses_of_its_draws,
    test_a_draw_is_shared_by_all_tokens_and_spares_the_ranks,
    test_a_rescaled_draw_keeps_the_mean,
    test_mean_and_spread_of_the_draws,
    lines=BROKEN,
)
