"""GaLore: between two choices of the subspace the change of a matrix has rank r; states are of size r."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor

import adapterlab as al
import everywhere
from adapterlab.errors import AttachError
from adapterlab.optim import adamw, master
from adapterlab.optim.transforms import Adam, Project, WeightDecay

R, GAP = 4, 5
MAKE = functools.partial(adamw, lr=3e-3)


def _train(host: Any, batch: Any, steps: int, make: Any = MAKE) -> tuple[Any, list[float]]:
    optimizer, losses = host.methods["default"].optimizer(host, "default", make), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = host.model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return optimizer, losses


def _rank(delta: Tensor) -> int:
    values = torch.linalg.svdvals(delta.double())
    return int((values > 1e-5 * values[0]).sum())


def measure(model: Any, batch: Any) -> list[set[int]]:
    """Ranks of W − W₀ over all projected matrices after 1, 2 and 3 subspaces; lists of sets of ranks."""
    host = al.attach(model, al.GaLore(r=R, update_proj_gap=GAP))
    sites = host.sites(host.methods["default"].targets)
    start = {s.path: s.module.weight.detach().clone() for s in sites}
    optimizer = host.methods["default"].optimizer(host, "default", MAKE)
    found = []
    for step in range(3 * GAP):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        if (step + 1) % GAP == 0:
            found.append({_rank(s.module.weight.detach() - start[s.path]) for s in sites})
    return found


def claim(ranks: list[set[int]]) -> bool:
    """At most r, 2 r, 3 r, and really that many somewhere: Adam must fill its subspace and must move to others."""
    return all(max(found) == R * (i + 1) for i, found in enumerate(ranks))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_claim_rank_grows_by_r_with_each_subspace(family: str, tiny: Any, batch_for: Any) -> None:
    model = tiny(family)
    assert claim(measure(model, batch_for(model, rows=8)))


@pytest.mark.parametrize("broken", ["always", "never", "no projection"])
def test_a_broken_projection_fails_the_claim(
    broken: str, tiny: Any, batch_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Project.update

    def update(self: Project, g: Tensor, state: Any, p: Tensor) -> Any:
        if broken == "no projection":
            return g, None
        state["step"] = 0 if broken == "always" or not state["step"] else 1
        return plain(self, g, state, p)

    monkeypatch.setattr(Project, "update", update)
    model = tiny("llama")
    assert not claim(measure(model, batch_for(model, rows=8)))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "bert-classes", "t5", "mixtral", "vit"])
def test_it_trains_and_is_undone_to_the_bit(family: str, tiny: Any, batch_for: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    host = al.attach(model, al.GaLore(r=R, update_proj_gap=2))
    assert host.summary().trainable == sum(p.numel() for p in model.parameters())
    _, losses = _train(host, batch, 8)
    assert losses[-1] < losses[0]
    host.detach("default")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_state_has_the_size_of_the_formula(tiny: Any, batch_for: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.GaLore(r=R))
    optimizer, _ = _train(host, batch_for(model), 2)
    projected = {s.module.weight for s in host.sites(host.methods["default"].targets)}
    expected = 0
    for p in model.parameters():
        m, n = (min(p.shape), max(p.shape)) if p in projected else (0, 0)
        expected += 2 * n * R + m * R if p in projected else 2 * p.numel()
    held = [v for p in model.parameters() for part in optimizer.state[p].values() for v in part.values()]
    assert sum(v.numel() for v in held if isinstance(v, Tensor)) == expected
    full = 2 * sum(p.numel() for p in projected)
    states = [value for p in projected for part in optimizer.state[p].values() for value in part.values()]
    own = sum(value.numel() for value in states if isinstance(value, Tensor))
    assert own < 0.3 * full


def test_what_is_outside_the_targets_follows_plain_adamw(tiny: Any, batch_for: Any) -> None:
    ours, theirs = tiny("llama"), tiny("llama")
    batch, make = batch_for(ours), functools.partial(adamw, lr=1e-3, weight_decay=0.1, betas=(0.8, 0.9))
    host = al.attach(ours, al.GaLore(r=R))
    _train(host, batch, 1, make)
    reference = make(list(theirs.parameters()))
    theirs(**batch).loss.backward()
    reference.step()
    projected = {f"{s.path}.weight" for s in host.sites(host.methods["default"].targets)}
    pairs = dict(theirs.named_parameters())
    for path, p in ours.named_parameters():
        close = torch.allclose(p, pairs[path], rtol=1e-5, atol=1e-6)
        assert close != (path in projected), path


def _updates(gradients: list[Tensor], side: Any, r: int) -> list[Tensor]:
    """What the authors' optimizer makes of gradients, in float64 but for the subspace: √bc2/bc1 · P M/(√V + 1e-6) Q."""
    u, _, v = torch.linalg.svd(gradients[0], full_matrices=False)
    left, right = u[:, :r].double(), v[:r].double()
    found, mean, square = [], 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        low = g.double() if side == "right" else left.T @ g.double()
        low = low if side == "left" else low @ right.T
        mean, square = 0.9 * mean + 0.1 * low, 0.999 * square + 0.001 * low**2
        step = (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * mean / (square.sqrt() + 1e-6)
        step = step if side == "right" else left @ step
        found.append(step if side == "left" else step @ right)
    return found


@pytest.mark.parametrize("side", ["full", "left", "right"])
def test_updates_are_the_original_ones(side: Any) -> None:
    """With both sides projected R is diagonal at first: what rounding leaves beside it must not become full steps."""
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(24, 20, generator=draw) * 1e-3 for _ in range(3)]
    model = torch.nn.Sequential(torch.nn.Linear(20, 24, bias=False))
    weight = model[0].weight
    host = al.attach(model, al.GaLore(targets=["0"], r=16, scale=1, proj_type=side))
    optimizer = host.methods["default"].optimizer(host, "default", functools.partial(adamw, lr=1.0, weight_decay=0.0))
    for g, expected in zip(gradients, _updates(gradients, side, 16), strict=True):
        before = weight.detach().double()
        weight.grad = g
        optimizer.step()
        assert torch.allclose(before - weight.detach(), expected, atol=2e-3)


def test_defaults_are_those_of_fine_tuning() -> None:
    method = al.GaLore()
    assert (method.r, method.scale, method.update_proj_gap) == (4, 4.0, 500)
    assert method.typical_lr * method.scale == pytest.approx(1.2e-4)
    assert method.typical_lr == 3e-5


def test_rest_off_trains_the_targets_alone(tiny: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.GaLore(targets=["q", "down"], rest=False, exclude=("layers.0",)))
    assert set(host.named_parameters("default")) == {
        "base.model.layers.1.self_attn.q_proj.weight", "base.model.layers.1.mlp.down_proj.weight",
    }  # fmt: skip
    assert host.summary().trainable == 32 * 32 + 48 * 32


@pytest.mark.parametrize("masters", [True, False])
def test_bf16_keeps_float32_moments_and_masters_only_if_asked(masters: bool, tiny: Any, batch_for: Any) -> None:
    model = tiny("llama").bfloat16()
    host = al.attach(model, al.GaLore(r=R, master_weights=masters))
    optimizer, losses = _train(host, batch_for(model), 6)
    assert losses[-1] < losses[0]
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    assert master(optimizer, weight).dtype == (torch.float32 if masters else torch.bfloat16)
    assert optimizer.state[weight]["2"]["mean"].dtype == torch.float32


def test_packed_weights_are_refused(tiny: Any) -> None:
    model = tiny("llama")
    weight = model.model.layers[0].mlp.up_proj
    weight._parameters["weight"] = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AttachError, match=r"up_proj.weight is stored packed .*without quantization"):
        al.attach(model, al.GaLore())
    assert al.host(model) is None


def test_moments_go_on_in_the_next_subspace_and_the_scale_is_that_of_updates_alone() -> None:
    """Five steps, a subspace for every two: W ← W − lr (scale · P M/(√V + eps) · √bc2/bc1 + wd · W)."""
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 12, bias=False))
    weight = model[0].weight
    w, mean, square = weight.detach().double(), 0.0, 0.0
    host = al.attach(model, al.GaLore(targets=["0"], r=4, scale=0.5, update_proj_gap=2, eps=1e-6))
    make = functools.partial(adamw, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95))
    optimizer = host.methods["default"].optimizer(host, "default", make)
    for t in range(1, 6):
        g = torch.randn(12, 24, generator=draw) + torch.eye(12, 24)
        weight.grad = g
        optimizer.step()
        if t % 2:
            p = torch.linalg.svd(g, full_matrices=False).U[:, :4].double()
        low = p.T @ g.double()
        mean, square = 0.8 * mean + 0.2 * low, 0.95 * square + 0.05 * low**2
        step = (1 - 0.95**t) ** 0.5 / (1 - 0.8**t) * mean / (square.sqrt() + 1e-6)
        w = w - 0.01 * (0.5 * p @ step + 0.1 * w)
        assert torch.allclose(weight.detach().double(), w, atol=1e-5)


MAKE_PROJECT, STEP, BASIS, DECAY = Project.__init__, Adam.update, Project.basis, WeightDecay.update


def _unscaled(self: Project, r: int, every: int, scale: float = 1.0, side: Any = "std") -> None:
    MAKE_PROJECT(self, r, every, 1.0, side)


def _forgetful(self: Adam, g: Tensor, state: Any, p: Tensor) -> Any:
    if g.shape[0] == 4 and state["step"] % 2 == 0:
        state.update(self.init(g))
    return STEP(self, g, state, p)


def _late(self: Adam, *args: Any, **options: Any) -> None:
    self.betas, self.eps, self.early, self.each = args[0], 0.1, False, False


MORE: dict[str, Mutation] = {
    "the scale ignored": (Project, "__init__", _unscaled),
    "moments reset with each subspace": (Adam, "update", _forgetful),
    "no bias correction": (Adam, "update", lambda self, g, state, p: STEP(self, g, {**state, "step": 10**6}, p)),
    "a random subspace": (Project, "basis", lambda self, g: BASIS(self, torch.randn_like(g))),
    "the decay scaled": (WeightDecay, "update", lambda self, g, s, p: (g, lambda u: u + 0.5 * self.decay * p)),
    "no decay": (WeightDecay, "update", lambda self, g, state, p: (g, None)),
    "another eps": (Adam, "__init__", _late),
}
test_it_fails_when_a_line_is_broken = fails_without(
    test_moments_go_on_in_the_next_subspace_and_the_scale_is_that_of_updates_alone, lines=MORE
)


@pytest.mark.parametrize(
    "method", [al.GaLore(update_proj_gap=2), al.GaLore(rest=False, proj_type="left", update_proj_gap=3)]
)
def test_other_settings_are_alike_in_every_loop(method: al.Method, tmp_path: Path) -> None:
    everywhere.check(method, tmp_path)
