"""AdaLoRA: the run is that of the written algorithm, and the budget goes to the module that needs it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterlab as al
import everywhere
from adapterlab.convert import AdapterChanges, analyze, export_lora
from adapterlab.errors import ConfigError, NotTrainingError
from adapterlab.methods.low_rank import adalora
from adapterlab.methods.low_rank.adalora import AdaLoRA

WIDTH, STEPS, LR, FIRST, LAST, EVERY = 16, 60, 0.02, 10, 40, 3
R0, TARGET, BETA1, BETA2, GAMMA, ALPHA = 6, 3, 0.8, 0.7, 0.3, 6.0
NAMES = ("A", "B", "E")


class Two(nn.Module):
    """Two linear maps side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], 1)


SHARED, ONE_SIDED = (0.9, 0.7), (1.0, 0.0)  # how singular values fall in what each map should learn


def task(falls: tuple[float, float] = ONE_SIDED) -> tuple[Any, Tensor, Tensor]:
    """Both maps are to change by rank 6, with values that fall so; ONE_SIDED: the second does not change at all."""
    torch.manual_seed(0)
    model, x, targets = Two(), torch.randn(256, WIDTH), []
    for layer, fall in zip((model.one, model.two), falls, strict=True):
        u, v = (torch.linalg.qr(torch.randn(WIDTH, R0))[0] for _ in range(2))
        change = u * (2 * fall ** torch.arange(R0)) @ v.T if fall else 0 * layer.weight
        targets.append(x @ (layer.weight + change).T)
    return model, x, torch.cat(targets, 1).detach()


def method(**fields: Any) -> Any:
    return al.AdaLoRA(**{
        "init_r": R0, "target_r": TARGET, "alpha": ALPHA, "tinit": FIRST, "tfinal": STEPS - LAST, "delta_t": EVERY,
        "beta1": BETA1, "beta2": BETA2, "orth_reg_weight": GAMMA, "targets": ["one", "two"], **fields,
    })  # fmt: skip


def loss_of(model: Any, x: Tensor, target: Tensor) -> Tensor:
    return (model(x) - target).square().sum(1).mean()


def run(host: Any, x: Tensor, target: Tensor, steps: range, optimizer: Any) -> list[Tensor]:
    """Train; return the importance of all triplets after each step."""
    found, trail = host.methods["default"], []
    for step in steps:
        optimizer.zero_grad()
        found.before_step(host, "default", step, optimizer)
        penalty = found.penalty(host, "default")
        (loss_of(host.model, x, target) + (0 if penalty is None else penalty)).backward()
        optimizer.step()
        found.after_step(host, "default", step, optimizer)
        trail.append(torch.cat([layer.importance() for layer in found.layers(host, "default").values()]))
    return trail


def ours(falls: tuple[float, float] = ONE_SIDED) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    """A trained host before anything is cut, the start of its tensors, and the importance after each step."""
    model, x, target = task(falls)
    host = al.attach(model, method())
    began = {k: v.detach().clone() for k, v in host.tensors("default").items() if k[-1] in NAMES}
    host.methods["default"].begin(host, "default", STEPS)
    trail = run(host, x, target, range(STEPS), torch.optim.Adam(host.parameters("default"), lr=LR))
    return host, began, trail


def budget(t: int) -> int:
    if t <= FIRST:
        return 2 * R0
    return int(2 * TARGET + 2 * (R0 - TARGET) * (1 - (t - FIRST) / (LAST - FIRST)) ** 3)


def written(began: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The algorithm as the paper and its code write it, with plain tensors: those at the end, and the importance."""
    model, x, target = task(SHARED)
    w = {key: value.clone().requires_grad_() for key, value in began.items()}
    mean, spread = ({key: torch.zeros_like(value) for key, value in began.items()} for _ in range(2))
    optimizer = torch.optim.Adam(list(w.values()), lr=LR)
    mask, trail = {name: torch.ones(R0, dtype=torch.bool) for name in ("one", "two")}, []
    for t in range(1, STEPS + 1):
        out, reg = [], []
        for name in ("one", "two"):
            q, p, e = (w[f"adapter.{name}.{key}"] for key in NAMES)
            out.append(x @ (getattr(model, name).weight.detach() + ALPHA / (R0 + 1e-5) * p @ torch.diag(e[:, 0]) @ q).T)
            reg += [torch.sqrt((m - torch.eye(R0)).square().sum()) for m in (p.T @ p, q @ q.T)]
        optimizer.zero_grad()
        ((torch.cat(out, 1) - target).square().sum(1).mean() + GAMMA * sum(reg) / len(reg)).backward()
        optimizer.step()
        with torch.no_grad():
            for key, value in w.items() if t < LAST else ():
                now = (value * value.grad).abs()
                mean[key] = BETA1 * mean[key] + (1 - BETA1) * now
                spread[key] = BETA2 * spread[key] + (1 - BETA2) * (now - mean[key]).abs()
            scores = []
            for name in mask:
                q, p, e = (mean[f"adapter.{name}.{key}"] * spread[f"adapter.{name}.{key}"] for key in NAMES)
                scores.append(e[:, 0] + p.mean(0) + q.mean(1))
            trail.append(torch.cat(scores))
            if t == LAST or (FIRST < t < LAST and t % EVERY == 0):
                threshold = torch.cat(scores).kthvalue(2 * R0 - budget(t)).values if budget(t) < 2 * R0 else -1
                mask = {name: score > threshold for name, score in zip(mask, scores, strict=True)}
                for name, kept in mask.items():
                    w[f"adapter.{name}.E"][~kept] = 0
            if t > LAST:
                for name, kept in mask.items():
                    w[f"adapter.{name}.E"][~kept] = 0
    return w, trail


def holds() -> bool:
    """It ends where the written algorithm does, and has the rank where that is needed."""
    host, began, trail = ours(SHARED)
    (theirs, scores), own = written(began), host.tensors("default")
    apart = max(float((own[key] - value).detach().abs().max()) for key, value in theirs.items())
    start = all(bool(value.any()) != key.endswith("E") for key, value in began.items())
    judged = all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(trail[: LAST - 1], scores, strict=False))
    return apart < 1e-4 and judged and start and left(ours()[0]) == [6, 0]


def left(host: Any) -> list[int]:
    """The triplets that the two maps have in the end."""
    return [int((host.tensors("default")[f"adapter.{name}.E"] != 0).sum()) for name in ("one", "two")]


def test_claim_it_is_the_written_algorithm_and_the_rank_goes_where_it_is_needed() -> None:
    assert holds()


def _scale(monkeypatch: Any) -> None:
    right = AdaLoRA.Layer.keep

    def keep(self: Any, mask: Tensor) -> None:
        right(self, mask)
        self.scale = ALPHA / max(1, int(mask.sum()))

    monkeypatch.setattr(AdaLoRA.Layer, "keep", keep)


def _without(monkeypatch: Any, name: str) -> None:
    monkeypatch.setattr(AdaLoRA.Layer, name, lambda self, *args: None)


def _judge(monkeypatch: Any, **wrong: Any) -> None:
    def judge(self: Any, beta1: float, beta2: float) -> None:
        for key in NAMES:
            w, mean, spread = (getattr(self, f"{key}{of}") for of in ("", "_mean", "_spread"))
            now = wrong.get("now", lambda w: (w * w.grad).abs())(w)
            before = mean.clone()
            mean.lerp_(now, 1 - wrong.get("beta1", beta1))
            apart = (now - (before if wrong.get("stale") else mean)).abs()
            spread.lerp_(apart, 1 - wrong.get("beta2", beta2))

    monkeypatch.setattr(AdaLoRA.Layer, "judge", judge)


def _importance(monkeypatch: Any, of: Any) -> None:
    def importance(self: Any) -> Tensor:
        parts = [getattr(self, f"{key}_mean") * getattr(self, f"{key}_spread") for key in NAMES]
        found: Tensor = of(self, *parts)
        return found

    monkeypatch.setattr(AdaLoRA.Layer, "importance", importance)


def _budget(monkeypatch: Any, of: Any) -> None:
    right = AdaLoRA.budget
    monkeypatch.setattr(AdaLoRA, "budget", lambda self, t, steps, n: of(right, self, t, steps, n))


def _apart(monkeypatch: Any, of: Any) -> None:
    monkeypatch.setattr(AdaLoRA.Layer, "apart", of)


MUTATIONS: dict[str, Any] = {
    "scale of the rank that is left": _scale,
    "sensitivity without weight": lambda m: _judge(m, now=lambda w: w.grad.abs()),
    "sensitivity without gradient": lambda m: _judge(m, now=lambda w: w.detach().abs()),
    "sensitivity squared": lambda m: _judge(m, now=lambda w: (w * w.grad).square()),
    "no average": lambda m: _judge(m, beta1=0.0),
    "no average of the changes": lambda m: _judge(m, beta2=0.0),
    "changes against the average before": lambda m: _judge(m, stale=True),
    "importance without changes": lambda m: _importance(m, lambda s, a, b, e: s.E_mean[:, 0] + s.A_mean.mean(1)),
    "importance of E alone": lambda m: _importance(m, lambda s, a, b, e: e[:, 0]),
    "importance without B": lambda m: _importance(m, lambda s, a, b, e: e[:, 0] + a.mean(1)),
    "sums for means": lambda m: _importance(m, lambda s, a, b, e: e[:, 0] + a.sum(1) + b.sum(0)),
    "the least important are kept": lambda m: m.setattr(
        adalora, "best", lambda scores, count, right=adalora.best: right([-s for s in scores], count)
    ),
    "each module its share": lambda m: m.setattr(
        adalora, "best", lambda scores, n, right=adalora.best: [right([s], n // len(scores))[0] for s in scores]
    ),
    "no budget": lambda m: _budget(m, lambda right, s, t, steps, n: n * s.init_r),
    "a budget that falls at once": lambda m: _budget(m, lambda right, s, t, steps, n: n * s.target_r),
    "a budget that falls in a line": lambda m: _budget(
        m, lambda right, s, t, steps, n: int(n * (s.init_r - (s.init_r - s.target_r) * max(0, t - FIRST) / 30))
    ),
    "pruning in every step": lambda m: m.setattr(
        AdaLoRA, "after_step", lambda self, host, name, step, optimizer, right=AdaLoRA.after_step: right(
            self.replace(delta_t=1), host, name, step, optimizer
        ),
    ),
    "no mask at all": lambda m: _without(m, "keep"),
    "no mask in the last phase": lambda m: m.setattr(
        AdaLoRA.Layer, "settle", lambda self, mask: self.kept.fill_(True)
    ),
    "no penalty": lambda m: m.setattr(AdaLoRA, "penalty", lambda self, host, name: None),
    "a squared penalty": lambda m: _apart(
        m, lambda self, right=AdaLoRA.Layer.apart: [d.square() for d in right(self)]
    ),
    "a penalty on A alone": lambda m: _apart(m, lambda self, right=AdaLoRA.Layer.apart: right(self)[:1]),
    "a penalty that is summed": lambda m: _apart(
        m, lambda self, right=AdaLoRA.Layer.apart: [4 * d for d in right(self)]
    ),
    "a start away from the base": lambda m: m.setattr(
        AdaLoRA.Layer, "__init__", lambda self, *args, right=AdaLoRA.Layer.__init__: (
            right(self, *args), nn.init.constant_(self.E, 0.1), None
        )[-1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", list(MUTATIONS))
def test_the_claim_fails_with(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[broken](monkeypatch)
    assert not holds()


@pytest.mark.slow
def test_it_needs_less_than_lora_for_the_same() -> None:
    """Six triplets where they are needed do better than three everywhere."""
    host, *_ = ours()
    model, x, target = task()
    lora = al.attach(model, al.LoRA(r=TARGET, alpha=TARGET, targets=["one", "two"]))
    optimizer = torch.optim.Adam(lora.parameters("default"), lr=LR)
    for _ in range(10 * STEPS):
        optimizer.zero_grad()
        loss_of(model, x, target).backward()
        optimizer.step()
    host.methods["default"].finish(host, "default")
    run(host, x, target, range(STEPS, 10 * STEPS), torch.optim.Adam(host.parameters("default"), lr=LR))
    assert loss_of(host.model, x, target) < 0.5 * loss_of(model, x, target)


def test_budgets_of_the_note() -> None:
    found = [al.AdaLoRA(init_r=6, target_r=4, tinit=10, tfinal=30).budget(t, 100, 16) for t in (0, 10, 11, 20, 40, 60)]
    assert found == [96, 96, 94, 82, 68, 64]
    assert al.AdaLoRA(init_r=6, target_r=4, tinit=0.1, tfinal=0.3).budget(70, 100, 16) == 64


def test_what_is_left_is_cut_saved_and_a_plain_lora_of_these_ranks(tmp_path: Path) -> None:
    host, *_ = ours()
    model, x, _ = task()
    wanted = host.model(x)
    host.save(tmp_path / "uncut")
    host.methods["default"].finish(host, "default")
    assert torch.allclose(host.model(x), wanted, atol=1e-5)
    assert host.methods["default"].outcome(host, "default") == {"ranks": "6 in all, layer by layer: one 6; two 0"}
    host.save(tmp_path / "cut")
    for folder in ("uncut", "cut"):
        again = al.load(copy.deepcopy(model), tmp_path / folder)
        assert torch.allclose(again.model(x), wanted, atol=1e-5)
        assert [len(layer.A) for layer in again.methods["default"].layers(again, "default").values()] == [6, 0]
    made = export_lora(host, "default")
    assert made.ranks == {"one": 6}
    assert made.error < 1e-6
    with host.using():
        assert [s.rank for s in analyze(AdapterChanges(host, "default")).spectra] == [6]
    with host.using("lora"):
        assert torch.allclose(host.model(x), wanted, atol=1e-4)


@pytest.mark.parametrize("at", [5, 25, 50])
def test_resumed_in_any_phase_it_ends_in_the_same_bits(at: int) -> None:
    whole, *_ = ours()
    model, x, target = task()
    hosts = [al.attach(copy.deepcopy(model), method()) for _ in range(2)]
    optimizers = [torch.optim.Adam(host.parameters("default"), lr=LR) for host in hosts]
    torch.manual_seed(0)
    hosts[0].load_state_dict("default", al.attach(task()[0], method()).state_dict("default"))
    for host, optimizer, steps in zip(hosts, optimizers, (range(at), range(at, STEPS)), strict=True):
        host.methods["default"].begin(host, "default", STEPS)
        if host is hosts[1]:
            host.load_state_dict("default", hosts[0].state_dict("default"))
            optimizer.load_state_dict(optimizers[0].state_dict())
        run(host, x, target, steps, optimizer)
    for key, value in whole.state_dict("default").items():
        assert torch.equal(hosts[1].state_dict("default")[key], value)


def test_schedules_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"target_r=9 is above init_r=6; choose 1 to 6"):
        method(target_r=9)
    with pytest.raises(ConfigError, match=r"target_r.*\n?.*0"):
        method(target_r=0)
    with pytest.raises(ConfigError, match="no share of the run"):
        method(tinit=0.5, tfinal=0.5)
    host = al.attach(task()[0], method())
    optimizer = torch.optim.SGD(host.parameters("default"), lr=0.1)
    with pytest.raises(NotTrainingError, match=r"begin\(host, 'default', steps\)"):
        host.methods["default"].before_step(host, "default", 0, optimizer)
    with pytest.raises(ConfigError, match=r"10 and 20 steps.*this run's 30 for pruning"):
        host.methods["default"].begin(host, "default", 30)


def test_e_has_no_weight_decay() -> None:
    host = al.attach(task()[0], method())
    made = host.methods["default"].optimizer(
        host, "default", lambda groups: torch.optim.AdamW(groups, weight_decay=0.1)
    )
    decays = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert {key[-1]: decays[id(p)] for key, p in host.named_parameters("default").items()} == {
        "A": 0.1,
        "B": 0.1,
        "E": 0,
    }


def test_start_and_count(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("gpt2")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.AdaLoRA(init_r=4, target_r=2))
    assert torch.equal(logits(model, batch), base)
    layers = host.adapters("default").values()
    assert host.summary().trainable == sum(4 * (sum(layer.site.shape) + 1) for layer in layers)


def test_other_settings_are_alike_in_every_loop(tmp_path: Path) -> None:
    everywhere.check(al.AdaLoRA(init_r=4, target_r=2, tinit=0, tfinal=2, delta_t=2), tmp_path)
