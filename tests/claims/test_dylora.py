"""DyLoRA: every prefix of ranks is a good adapter, which a truncated LoRA is not."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn

import adapterlab as al
import everywhere
from adapterlab.errors import ConfigError
from adapterlab.methods.low_rank.dylora import DyLoRA

R, WIDTH = 8, 24


def teacher() -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    u, v = (torch.linalg.qr(torch.randn(WIDTH, R))[0] for _ in range(2))
    change = u * (4 * 0.7 ** torch.arange(R)) @ v.T
    x = torch.randn(256, WIDTH)
    return model, x, x @ (model[0].weight.detach() + change).T


def train(method: Any, steps: int = 800) -> tuple[Any, Any, Tensor, Tensor]:
    model, x, target = teacher()
    host = al.attach(model, method)
    model.train()
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.02)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        method.before_step(host, "default", step, optimizer)
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        method.after_backward(host, "default", step)
        optimizer.step()
        method.after_step(host, "default", step, optimizer)
    return model.eval(), host, x, target


def measure() -> list[float]:
    """Loss at ranks 1 to r."""
    model, host, x, target = train(al.DyLoRA(r=R, targets=["0"]))
    losses = []
    for b in range(1, R + 1):
        host.methods["default"].truncate(host, "default", b)
        losses.append((model(x) - target).square().mean().item())
    return losses


def lora() -> list[float]:
    """The same for a LoRA whose factors are cut, with its own scale."""
    model, host, x, target = train(al.LoRA(r=R, targets=["0"]))
    layer: Any = host.adapters("default")["0"]
    a, b, w = layer.A, layer.B, model[0].weight
    return [(x @ (w + layer.scale * b[:, :k] @ a[:k]).T - target).square().mean().item() for k in range(1, R + 1)]


def holds() -> bool:
    ours, theirs = measure(), lora()
    falls = all(after <= 1.02 * before for before, after in itertools.pairwise(ours))
    return falls and all(a < b for a, b in zip(ours[:4], theirs[:4], strict=True))


def test_every_prefix_of_ranks_is_good() -> None:
    assert holds()


@pytest.mark.parametrize(("scale", "ratio"), [("linear", 4 / 3), ("sqrt", (4 / 3) ** 0.5)])
def test_training_and_evaluation_use_the_first_ranks_with_their_scale(scale: Any, ratio: float, randomise: Any) -> None:
    model, x, _ = teacher()
    method = al.DyLoRA(r=4, alpha=6, scale=scale, inference_rank=3, targets=["0"])
    host = al.attach(model, method)
    randomise(host)
    layer: Any = host.adapters("default")["0"]
    s = ratio * (6 / 4 if scale == "linear" else 3)
    expected = x @ (model[0].weight + s * layer.B[:, :3] @ layer.A[:3]).T
    model.eval()
    assert torch.allclose(model(x), expected, atol=1e-4)
    layer.take(3, alone=False)
    model.train()
    assert torch.allclose(model(x), expected, atol=1e-4)
    host.merge()
    assert torch.allclose(model(x), expected, atol=1e-4)


@pytest.mark.parametrize(("update", "strict"), [("prefix", True), ("row", True), ("row", False)])
def test_what_a_step_trains(update: Any, strict: bool, randomise: Any) -> None:
    model, x, target = teacher()
    method = al.DyLoRA(r=4, update=update, strict=strict, targets=["0"])
    host = al.attach(model, method)
    randomise(host)
    model.train()
    layer: Any = host.adapters("default")["0"]
    optimizer = torch.optim.AdamW(host.parameters("default"), lr=0.1, weight_decay=0.5)
    before = layer.A.detach().clone(), layer.B.detach().clone()
    method.before_step(host, "default", 0, optimizer)
    b = method.draw(0)
    (model(x) - target).square().mean().backward()
    inside = torch.arange(4) == b - 1 if update == "row" else torch.arange(4) < b
    assert (layer.A.grad[~inside] == 0).all(), "clipping comes next, and counts all that is there"
    assert (layer.B.grad[:, ~inside] == 0).all()
    assert (layer.A.grad[inside] != 0).any(1).all()
    assert (layer.B.grad[:, inside] != 0).any(0).all()
    method.after_backward(host, "default", 0)
    optimizer.step()
    method.after_step(host, "default", 0, optimizer)
    moved = torch.stack([(layer.A - before[0]).abs().sum(1) > 0, (layer.B - before[1]).abs().sum(0) > 0])
    assert torch.equal(moved, (inside if strict else torch.ones(4).bool()).expand(2, 4))


def test_draws_follow_the_step_alone() -> None:
    method = al.DyLoRA(r=8, r_min=3, draws="geometric", seed=4)
    found = [method.draw(step) for step in range(400)]
    assert found == [al.DyLoRA(r=8, r_min=3, draws="geometric", seed=4).draw(step) for step in range(400)]
    assert set(found) == set(range(3, 9))
    assert found.count(3) > 1.5 * found.count(8)
    assert found != [al.DyLoRA(r=8, r_min=3, draws="geometric", seed=5).draw(step) for step in range(400)]
    even = [al.DyLoRA(r=8, r_min=3).draw(step) for step in range(600)]
    assert all(70 < even.count(rank) < 130 for rank in range(3, 9))


def test_ranks_out_of_reach_are_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match=r"r_min=9 is above r=8"):
        al.DyLoRA(r_min=9)
    host = al.attach(tiny("llama"), al.DyLoRA(r=4, targets=["q"]))
    with pytest.raises(ConfigError, match=r"ranks 1 to 4.*b=5"):
        host.methods["default"].truncate(host, "default", 5)


def test_start_and_count(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("gpt2")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.DyLoRA(r=4))
    assert torch.equal(logits(model, batch), base)
    assert host.summary().trainable == sum(4 * sum(a.site.shape) for a in host.adapters("default").values())


LAYER, TAKE, PASSING, DRAW = DyLoRA.Layer, DyLoRA.Layer.take, DyLoRA.Layer.passing, DyLoRA.draw


def _taken(change: Any) -> Mutation:
    def take(self: Any, b: int, alone: bool) -> None:
        TAKE(self, b, alone)
        change(self, b)

    return (LAYER, "take", take)


BROKEN: dict[str, Mutation] = {
    "all ranks train always": (LAYER, "take", lambda self, b, alone: None),
    "all ranks are used": _taken(lambda layer, b: layer.drawn.fill_(1)),
    "the last ranks are used": _taken(lambda layer, b: layer.drawn.copy_(layer.drawn.flip(0))),
    "the rank alone is used": _taken(lambda layer, b: layer.drawn[: b - 1].zero_()),
    "trained beyond the rank": _taken(lambda layer, b: layer.trained.fill_(1)),
    "the first ranks train where one should": (LAYER, "take", lambda self, b, alone: TAKE(self, b, False)),
    "one scale for all ranks": (LAYER, "weight_of", lambda self, b: 1.0),
    "the scale of the root": (LAYER, "weight_of", lambda self, b: (len(self.A) / b) ** 0.5),
    "gradients left as they are": (LAYER, "passing", lambda self: (self.A, self.B)),
    "gradients of A left as they are": (LAYER, "passing", lambda self: (self.A, PASSING(self)[1])),
    "gradients of B left as they are": (LAYER, "passing", lambda self: (PASSING(self)[0], self.B)),
    "no values noted": (DyLoRA, "after_backward", lambda self, host, name, step: None),
    "what did not train moves": (DyLoRA, "after_step", lambda self, *_: None),
    "the smallest rank ignored": (DyLoRA, "draw", lambda self, step: DRAW(self.replace(r_min=1), step)),
    "the seed ignored": (DyLoRA, "draw", lambda self, step: DRAW(self.replace(seed=0), step)),
    "always uniform": (DyLoRA, "draw", lambda self, step: DRAW(self.replace(draws="uniform"), step)),
    "always geometric": (DyLoRA, "draw", lambda self, step: DRAW(self.replace(draws="geometric"), step)),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_training_and_evaluation_use_the_first_ranks_with_their_scale, "linear", 4 / 3),
    functools.partial(test_what_a_step_trains, "prefix", True),
    functools.partial(test_what_a_step_trains, "row", True),
    functools.partial(test_what_a_step_trains, "row", False),
    test_draws_follow_the_step_alone,
    lines=BROKEN,
)


@pytest.mark.slow
def test_prefixes_are_bad_when_all_ranks_train_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN["all ranks train always"])
    assert not holds()


@pytest.mark.parametrize("method", [al.DyLoRA(r=4, update="row"), al.DyLoRA(r=4, update="row", strict=True)])
def test_other_settings_are_alike_in_every_loop(method: al.Method, tmp_path: Path) -> None:
    everywhere.check(method, tmp_path)
