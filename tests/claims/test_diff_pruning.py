"""Diff pruning: an adaptive search finds where a change belongs, the budget is exact, and what is stored is sparse."""

from __future__ import annotations

import functools
import math
import weakref
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn

import adapterlab as al
import everywhere
from adapterlab.errors import AttachError, ConfigError, NotTrainingError
from adapterlab.methods.in_place.diff_pruning import DiffPruning, Gated
from adapterlab.optim import AdamW, adamw
from adapterlab.train import Loop, Training


class Regression(nn.Module):
    """A linear layer and its squared error."""

    def __init__(self, in_: int, out: int, bias: bool = False):
        super().__init__()
        self.inner = nn.Linear(in_, out, bias=bias)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return SimpleNamespace(loss=(self.inner(x) - labels).square().mean())


def _falling(step: float, steps: int) -> float:
    return 1 - step / steps


def _run(host: Any, batch: Any, steps: int, lr: float, plain: Any = _falling, **options: Any) -> Any:
    """A training loop that tells the events of a method, with a schedule."""
    method, name = host.methods["default"], "default"
    host.model.train()
    method.begin(host, name, steps)
    optimizer = method.optimizer(host, name, functools.partial(adamw, lr=lr, **options))
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * method.rate(step, steps, functools.partial(plain, steps=steps))
        method.before_step(host, name, step, optimizer)
        optimizer.zero_grad()
        loss, penalty = host.model(**batch).loss, method.penalty(host, name)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        method.after_step(host, name, step, optimizer)
    method.finish(host, name)
    return optimizer


# ---------------------------------------------------------------------- the claim

WIDE, ROWS, SHARE, NOISE = 64, 48, 0.01, 0.5


def _task(noise: float = NOISE) -> tuple[Any, Any, Tensor]:
    """Noisy rows, fewer than inputs, of a layer that differs from the base's in one entry of a hundred."""
    torch.manual_seed(0)
    model = Regression(WIDE, WIDE)
    draw = torch.Generator().manual_seed(1)
    true = torch.zeros(WIDE * WIDE)
    places = torch.randperm(len(true), generator=draw)[: int(SHARE * len(true))]
    true[places] = 0.8 * torch.randn(len(places), generator=draw).sign()
    x = torch.randn(ROWS, WIDE, generator=draw)
    with torch.no_grad():
        y = model.inner(x) + x @ true.view(WIDE, WIDE).T + noise * torch.randn(ROWS, WIDE, generator=draw)
    return model, {"x": x, "labels": y}, true != 0


def measure() -> tuple[float, float]:
    """Share of the entries of the true change that are kept: by the search, and by pruning a dense change."""
    model, batch, true = _task()
    host = al.attach(model, al.DiffPruning(density=SHARE, sparsity=1e-3, start=2.0, structured=False))
    _run(host, batch, 250, 1e-2)
    found = host.patches["default"]["inner.weight"].index
    model, batch, true = _task()
    start = model.inner.weight.detach().clone()
    dense = al.attach(model, al.Full())
    optimizer = adamw(dense.parameters("default"), lr=1e-2)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 1e-2 * _falling(step, 200)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    largest = (model.inner.weight.detach() - start).abs().flatten().topk(len(found)).indices
    return float(true[found].float().mean()), float(true[largest].float().mean())


def claim(adaptive: float, pruned: float) -> bool:
    """Measured: 0.97 and 0.15; without the penalty 0.65, with gates at the rate of w 0.72."""
    return adaptive > 0.85 and adaptive > 1.3 * pruned


def test_claim_the_search_finds_more_of_the_change_than_pruning_does() -> None:
    assert claim(*measure())


# ---------------------------------------------------------------------- the algorithm

STEPS, FIRST, LR, WEIGHT, START = 7, 4, 3e-2, 2e-3, 1.5
FIELDS: dict[str, Any] = {"density": 0.4, "search": FIRST, "sparsity": WEIGHT, "start": START, "gate_lr": 0.2}
LOW, HIGH = -1.5, 1.5


def _small() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Regression(6, 5, bias=True).double()
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(9, 6, generator=draw, dtype=torch.float64)
    return model, {"x": x, "labels": torch.randn(9, 5, generator=draw, dtype=torch.float64)}


def _drawn(leaf: str, shape: tuple[int, ...], step: int) -> list[Tensor]:
    """What is uniform in (0, 1) in one step: for the entries, and for the tensor."""
    origin = np.random.SeedSequence((0, zlib.crc32(f"inner.{leaf}".encode()), step))
    draw = torch.Generator().manual_seed(int(origin.generate_state(1)[0]))
    u = [torch.rand(size, generator=draw, dtype=torch.float64) for size in (shape, (1,))]
    return [each.clamp(1e-4, 1 - 1e-4) for each in u]


def _concrete(alpha: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and their derivatives, as the authors compute them."""
    s = torch.sigmoid(u.log() - (1 - u).log() + alpha)
    stretched = s * (HIGH - LOW) + LOW
    inside = (stretched > 0) & (stretched < 1)
    return stretched.clamp(0, 1), inside * (HIGH - LOW) * s * (1 - s)


def _slopes(theta: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
    held = {key: value.clone().requires_grad_(True) for key, value in theta.items()}
    loss = (batch["x"] @ held["weight"].T + held["bias"] - batch["labels"]).square().mean()
    return dict(zip(held, torch.autograd.grad(loss, list(held.values())), strict=True))


def _reference(model: Any, batch: Any, structured: bool, form: str) -> dict[str, Tensor]:
    """The two phases with derivatives that are written down, and an optimizer for each of w and the gates."""
    base = {key: getattr(model.inner, key).detach().clone() for key in ("weight", "bias")}
    w = {key: nn.Parameter(torch.zeros_like(p)) for key, p in base.items()}
    alpha = {key: nn.Parameter(torch.full_like(p, START)) for key, p in base.items()}
    group = {key: nn.Parameter(torch.full((1,), START, dtype=torch.float64)) for key in base}
    train = torch.optim.AdamW(list(w.values()), lr=LR, weight_decay=0.1)
    close = torch.optim.AdamW([*alpha.values(), *group.values()], lr=FIELDS["gate_lr"], weight_decay=0.0)

    def gates(key: str, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u, v = _drawn(key, base[key].shape, step)
        z_g, dz_g = _concrete(group[key].detach(), v)
        z, dz = _concrete(alpha[key].detach(), u)
        return (z, dz, z_g, dz_g) if structured else (z, dz, torch.ones(1), torch.zeros(1))

    for step in range(FIRST):
        train.param_groups[0]["lr"] = LR * (1 - step / FIRST)
        drawn = {key: gates(key, step) for key in base}
        theta = {key: base[key] + z * z_g * w[key].detach() for key, (z, _, z_g, _) in drawn.items()}
        for key, slope in _slopes(theta, batch).items():
            z, dz, z_g, dz_g = drawn[key]
            p, p_g = torch.sigmoid(alpha[key].detach()), torch.sigmoid(group[key].detach())  # l = -r
            of_all = p_g if structured and form == "product" else 1.0
            w[key].grad = slope * z * z_g
            alpha[key].grad = slope * w[key].detach() * z_g * dz + WEIGHT * p * (1 - p) * of_all
            of_each = p.sum() if form == "product" else 1.0
            group[key].grad = (slope * w[key].detach() * z).sum() * dz_g + WEIGHT * p_g * (1 - p_g) * of_each
        train.step()
        close.step()
    delta = {}
    for key in base:
        z, _, z_g, _ = gates(key, FIRST)
        delta[key] = (z * z_g * w[key].detach()).clone()
    every = torch.cat([d.flatten().abs() for d in delta.values()])
    least = every.topk(int(FIELDS["density"] * len(every))).values[-1]
    mask = {key: d.abs() >= least for key, d in delta.items()}
    w = {key: nn.Parameter(d * mask[key]) for key, d in delta.items()}
    train = torch.optim.AdamW(list(w.values()), lr=LR, weight_decay=0.1)
    for step in range(STEPS - FIRST):
        train.param_groups[0]["lr"] = 5 * LR * (1 - step / (STEPS - FIRST))
        slopes = _slopes({key: base[key] + w[key].detach() for key in base}, batch)
        for key in base:
            w[key].grad = slopes[key] * mask[key]
        train.step()
    return {key: base[key] + w[key].detach() for key in base}


@pytest.mark.parametrize(("structured", "form"), [(True, "product"), (True, "sum"), (False, "product")])
def test_it_is_the_authors_algorithm(structured: bool, form: Any) -> None:
    model, batch = _small()
    base = {key: getattr(model.inner, key).detach().clone() for key in ("weight", "bias")}
    host = al.attach(model, al.DiffPruning(**FIELDS, structured=structured, penalty_form=form))
    wanted = _reference(model, batch, structured, form)
    _run(host, batch, STEPS, LR, weight_decay=0.1)
    kept = 0
    for key, value in wanted.items():
        p = getattr(model.inner, key)
        assert torch.allclose(p, value, rtol=1e-9, atol=1e-12), key
        assert torch.equal(p != base[key], value != base[key])
        kept += int((p != base[key]).sum())
    assert kept == host.summary().trainable == int(0.4 * 35)


def test_gates_have_the_distribution_of_the_paper() -> None:
    """P(z = 0), P(z = 1) and the mean of drawn gates, against the closed form of the hard-concrete distribution."""
    host = al.attach(Regression(200, 200), al.DiffPruning(start=1.0, low=-0.5, high=2.0))
    layer = host.methods["default"].layers(host, "default")["inner"]
    alpha = layer.gate["weight"]
    z = layer.opened(alpha, layer.generator("weight")).detach()

    def below(level: float) -> float:  # P(stretched s < level)
        s = (level + 0.5) / 2.5
        return 1 / (1 + math.exp(-(math.log(s / (1 - s)) - 1.0)))

    levels = torch.linspace(0, 1, 2001)
    mean = sum(1 - below(float(level)) for level in levels) / len(levels)
    assert float((z == 0).float().mean()) == pytest.approx(below(0), abs=0.01)
    assert float((z == 1).float().mean()) == pytest.approx(1 - below(1), abs=0.01)
    assert float(z.mean()) == pytest.approx(mean, abs=0.01)
    assert float(layer.probability(alpha)[0, 0].detach()) == pytest.approx(1 - below(0), rel=1e-5)
    layer.step = 1
    assert not torch.equal(z, layer.opened(alpha, layer.generator("weight")))


# ---------------------------------------------------------------------- what is left


def _fitted(model: Any, batch: Any, steps: int = 6, **fields: Any) -> Any:
    host = al.attach(model, al.DiffPruning(**{"density": 0.03, "sparsity": 1e-5, **fields}))
    _run(host, batch, steps, 1e-2, weight_decay=0.1)
    return host


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bert-masked", "t5", "mixtral"])
def test_the_budget_is_exact_and_all_else_is_the_base(family: str, tiny: Any, batch_for: Any, logits: Any) -> None:
    """Momentum and weight decay leave what is not kept as it was, to the bit; so do merging, undoing and detaching."""
    model = tiny(family)
    batch = batch_for(model)
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    keys, first = list(model.state_dict()), logits(model, batch)
    host = _fitted(model, batch)
    tuned = {path: p.detach().clone() for path, p in model.named_parameters() if path in before}
    answer = logits(model, batch)
    assert all(torch.equal(model.get_parameter(path), value) for path, value in tuned.items())  # written already
    kept = {path: patch.index for path, patch in host.patches["default"].items()}
    k = int(0.03 * sum(p.numel() for p in before.values()))
    assert sum(map(len, kept.values())) == host.summary().trainable == k
    for path, p in tuned.items():
        moved = (p != before[path]).flatten().nonzero().flatten()
        assert torch.isin(moved, kept.get(path, moved[:0])).all(), path
    assert sum(int((tuned[path] != before[path]).sum()) for path in before) > 0.9 * k
    host.merge()
    assert torch.equal(logits(model, batch), answer)
    host.restore()
    with host.using():
        assert torch.equal(logits(model, batch), first)
    assert torch.equal(logits(model, batch), answer)
    host.detach("default")
    assert list(model.state_dict()) == keys
    assert all(torch.equal(p, before[path]) for path, p in model.named_parameters())


def test_what_is_saved_is_sparse_and_comes_back(tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    batch = batch_for(model)
    host = al.attach(model, al.DiffPruning(density=0.03))
    method: Any = host.methods["default"]
    method.begin(host, "default", 4)
    for p in host.parameters("default"):
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    host.save(tmp_path / "searching")  # before the end it holds all entries
    again = al.load(tiny("llama-tied"), tmp_path / "searching")
    assert torch.equal(logits(again.model, batch), logits(model, batch))
    method.finish(host, "default")
    host.save(tmp_path / "done")
    again = al.load(tiny("llama-tied"), tmp_path / "done")
    assert torch.equal(logits(again.model, batch), logits(model, batch))
    sizes = [(tmp_path / each / "adapter_model.safetensors").stat().st_size for each in ("searching", "done")]
    count = host.summary().trainable
    assert sizes[1] < 12 * count + 400 * len(host.patches["default"]) < sizes[0] / 5
    assert method.outcome(host, "default")["entries"].startswith(f"{count:,} of ")
    _run(again, batch, 2, 1e-2)  # trains the entries that it has
    assert again.summary().trainable == count


def test_the_values_of_a_layer_are_not_kept_for_the_backward_pass(
    tiny: Any, batch_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights are made anew for one module at a time; the second time in the backward pass."""
    model = tiny("llama")
    batch = batch_for(model)
    host = al.attach(model, al.DiffPruning())
    made: list[Any] = []
    plain = Gated.values

    def values(self: Gated, parameters: Any) -> Any:
        found = plain(self, parameters)
        made.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(Gated, "values", values)
    loss = model.train()(**batch).loss
    count = len(made)
    assert count == len(host.base_parameters())
    assert not any(ref() is not None for ref in made)
    loss.backward()
    assert len(made) == 2 * count


@pytest.mark.slow
def test_it_is_the_same_in_every_loop_with_the_cut_before_the_stop(tmp_path: Path) -> None:
    """The other case, a stop while gates are open, is that of the tests of all methods."""
    everywhere.check(al.DiffPruning(density=0.05, search=0.2, sparsity=1e-5), tmp_path)


def test_a_new_head_trains_whole_and_a_run_that_ends_early_keeps_to_the_budget(tiny: Any, batch_for: Any) -> None:
    model = tiny("bert-classes")
    batch = batch_for(model)
    head = sum(p.numel() for p in model.classifier.parameters())
    eligible = sum(p.numel() for p in model.parameters()) - head
    host = al.attach(model, al.DiffPruning(density=0.03, modules_to_save=("classifier",)))
    method: Any = host.methods["default"]
    method.begin(host, "default", 100)
    optimizer = method.optimizer(host, "default", functools.partial(adamw, lr=1e-2))
    method.before_step(host, "default", 0, optimizer)
    host.model.train()(**batch).loss.backward()
    optimizer.step()
    method.finish(host, "default")  # as when evaluation has stopped improving
    assert host.summary().trainable == int(0.03 * eligible) + head


def test_optimizer_and_rates_begin_the_second_phase_anew(
    tiny: Any, batch_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate of w has its schedule twice, that of the gates is constant, and moments are forgotten at the cut."""
    model, rates, plain = tiny("llama"), [], AdamW.step

    def step(self: AdamW, closure: Any = None) -> Any:
        rates.append([group["lr"] for group in self.param_groups])
        return plain(self, closure)

    monkeypatch.setattr(AdamW, "step", step)
    host = al.attach(model, al.DiffPruning(density=0.03, search=2))
    method: Any = host.methods["default"]
    gates = {id(p) for layer in method.layers(host, "default").values() for p in layer.gates()}
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in batch_for(model, rows=8)["input_ids"]]
    loop = Loop(host, "default", rows, Training(steps=5, batch_size=2, lr=1e-3, schedule="linear", warmup=0))
    for counted in (1, 2, 1):
        loop.step()
        held = loop._raw.state
        assert {float(state["step"]) for state in held.values()} == {counted}
        assert any(id(p) in gates for p in held) == (method.penalty(host, "default") is not None)
    assert rates[0] == pytest.approx([1e-3, 0.1])
    assert rates[1] == pytest.approx([5e-4, 0.1])
    assert rates[2][0] == pytest.approx(5e-3)
    assert method.penalty(host, "default") is None


def test_what_does_not_fit_is_named(tiny: Any) -> None:
    host = al.attach(tiny("llama"), al.DiffPruning(search=9))
    method: Any = host.methods["default"]
    with pytest.raises(NotTrainingError, match=r"does not know how many steps.*begin\(host, 'default', steps\)"):
        method.before_step(host, "default", 0, adamw(host.parameters("default"), lr=1.0))
    with pytest.raises(ConfigError, match="search=9 steps do not fit into this run's 5"):
        method.begin(host, "default", 5)
    method.begin(host, "default", 20)
    with pytest.raises(NotTrainingError, match="gates need a rate of their own"):
        method.before_step(host, "default", 0, adamw(host.parameters("default"), lr=1.0))
    with pytest.raises(AttachError, match=r"density=1e-09 of [\d,]+ entries keeps none"):
        al.attach(tiny("llama"), al.DiffPruning(density=1e-9))


CHANGE, KEEP, OPENED = Gated.change, Gated.keep, Gated.opened


def _no_gates_of_entries(self: Gated, leaf: str, *, drawn: bool) -> Tensor:
    draw = self.generator(leaf) if drawn and not self.fixed else None
    self.opened(self.gate[leaf], draw)
    return self.diff[leaf] * self.opened(self.group[leaf], draw)


def _no_gates_of_tensors(self: Gated, leaf: str, *, drawn: bool) -> Tensor:
    draw = self.generator(leaf) if drawn and not self.fixed else None
    return self.diff[leaf] * self.opened(self.gate[leaf], draw)


def _smallest(self: Any, layer: Gated, leaf: str) -> Tensor:
    return 1 / (1e-9 + CHANGE(layer, leaf, drawn=True).abs().flatten())


def _rate_of_w(self: Any, name: str, layers: Any, optimizer: Any) -> None:
    optimizer.param_groups[1]["lr"] = optimizer.param_groups[0]["lr"]


def _from_w(self: Gated, leaf: str, index: Any) -> None:
    w = self.diff[leaf].clone()
    KEEP(self, leaf, index)
    self.diff[leaf].copy_(torch.where(self.gate[leaf] > 0, w, 0.0))


def _all_open(self: Gated, leaf: str, index: Any) -> None:
    KEEP(self, leaf, index)
    self.gate[leaf].fill_(50.0)


def _one_schedule(self: Any, step: int, steps: int, plain: Any) -> float:
    return float(plain(step))


BROKEN: dict[str, Mutation] = {
    "gates are not drawn": (Gated, "opened", lambda self, alpha, draw: OPENED(self, alpha, None)),
    "gates are not stretched": (Gated, "stretched", lambda self, s: s),
    "the chance is that of any gate": (Gated, "probability", lambda self, alpha: alpha.sigmoid() ** 2),
    "the same gates in every step": (Gated, "generator", lambda self, leaf: torch.Generator().manual_seed(0)),
    "no gates of entries": (Gated, "change", _no_gates_of_entries),
    "no gates of tensors": (Gated, "change", _no_gates_of_tensors),
    "the penalty is of entries alone": (Gated, "expected", lambda self, leaf: self.probability(self.gate[leaf]).sum()),
    "no penalty": (DiffPruning, "penalty", lambda self, host, name: None),
    "gates at the rate of w": (DiffPruning, "_set_gate_rate", _rate_of_w),
    "gates follow the schedule": (DiffPruning, "_set_gate_rate", lambda self, name, layers, optimizer: None),
    "one schedule for both phases": (DiffPruning, "rate", _one_schedule),
    "cut by w": (DiffPruning, "size", lambda self, layer, leaf: layer.diff[leaf].abs().flatten()),
    "the smallest are kept": (DiffPruning, "size", _smallest),
    "fewer are kept": (DiffPruning, "_count", lambda self, places: 5),
    "the second phase starts from w": (Gated, "keep", _from_w),
    "the second phase trains all": (Gated, "keep", _all_open),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_it_is_the_authors_algorithm, True, "product"), lines=BROKEN
)


@pytest.mark.parametrize("line", ["no penalty", "gates at the rate of w"])
def test_the_search_finds_less_without(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[line])
    assert not claim(*measure())
