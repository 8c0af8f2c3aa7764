"""LT-SFT: the run is the written one, and sparse changes of two tasks add up better than dense ones."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn
from torch.func import functional_call

import adapterlab as al
import everywhere
from adapterlab.convert import combine
from adapterlab.errors import AttachError, ConfigError, NotTrainingError
from adapterlab.hosts import Host
from adapterlab.methods.in_place import _chosen_parameters as _select
from adapterlab.methods.in_place import _one_vector as one_vector
from adapterlab.methods.in_place.lt_sft import LTSFT
from adapterlab.optim import factor

STEPS, FIRST, DENSITY, L1 = 20, 8, 0.1, 3.0
LR, DECAY = 1e-2, 0.1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.inner, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.inner(torch.tanh(self.body(x)))))
        return y


def task(seed: int = 0) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(seed)
    net, other = Net(), Net()
    x = torch.randn(40, 12)
    return net, x, other(x).detach()


def plain(step: float, steps: int = STEPS) -> float:
    return factor(step, steps, kind="linear", warmup=3)


def make(parameters: Any, lr: float = LR, weight_decay: float = DECAY) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


def ours(net: nn.Module, x: Tensor, y: Tensor, steps: int = STEPS, **fields: Any) -> Host:
    """Train by the events, as a loop does."""
    host = al.attach(net, al.LTSFT(**{"density": DENSITY, "dense": FIRST, **fields}))
    method: Any = host.methods["default"]
    method.begin(host, "default", steps)
    optimizer = method.optimizer(host, "default", make)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * method.rate(step, steps, functools.partial(plain, steps=steps))
        method.before_step(host, "default", step, optimizer)
        loss = nn.functional.mse_loss(net(x), y)
        penalty = method.penalty(host, "default")
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
    host.refresh("default")
    return host


def written(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The authors' two runs: a dense one, and one of the entries that it moved most; heads dense in both."""
    start = {key: p.detach().clone() for key, p in net.named_parameters()}
    total = sum(p.numel() for p in start.values())
    sparse = [key for key in start if not key.startswith("head")]
    heads = {key: p for key, p in start.items() if key.startswith("head")}

    def train(values: dict[str, Tensor], steps: int, place: Any) -> dict[str, Tensor]:
        """Optimize `values`; `place` makes the parameters of the net, and what the penalty is on."""
        trained = {key: value.clone().requires_grad_(True) for key, value in values.items()}
        optimizer = make(list(trained.values()))
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = LR * plain(step * STEPS / steps)
            parameters, moved = place(trained)
            loss = nn.functional.mse_loss(functional_call(net, parameters, x), y) + L1 / total * moved
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {key: value.detach() for key, value in trained.items()}

    dense = train(
        start, FIRST, lambda held: (held, torch.stack([(held[key] - start[key]).abs().sum() for key in sparse]).sum())
    )
    moved = torch.cat([(dense[key] - start[key]).abs().flatten() for key in sparse])
    count = int(DENSITY * len(moved))
    index = moved.argsort(descending=True)[:count].sort().values
    flat = torch.cat([start[key].flatten() for key in sparse])

    def placed(held: dict[str, Tensor]) -> Any:
        whole = flat.index_put((index,), held["entries"])
        parts = whole.split([start[key].numel() for key in sparse])
        body = {key: part.view(start[key].shape) for key, part in zip(sparse, parts, strict=True)}
        return {**body, **{k: held[k] for k in heads}}, (held["entries"] - flat[index]).abs().sum()

    final = train({"entries": flat[index], **heads}, STEPS - FIRST, placed)
    return {key: value.detach() for key, value in placed(final)[0].items()}


def now(host: Host) -> dict[str, Tensor]:
    """What the model computes with, by the base's names."""
    found = {key: p.detach().clone() for key, p in host.model.named_parameters() if not host.is_adapter_path(key)}
    copied = host.adapters("default")["head"].copy
    return {**found, **{f"head.{key}": p.detach() for key, p in copied.named_parameters()}}


@functools.cache
def reference() -> dict[str, Tensor]:
    return written(*task())


def holds() -> bool:
    host = ours(*task(), l1=L1, modules_to_save=("head",))
    found = now(host)
    return max(float((found[key] - value).abs().max()) for key, value in reference().items()) < 1e-5


def test_claim_the_run_is_the_written_one() -> None:
    assert holds()


TOP, ORIGINAL, RATE = _select.top, one_vector.original, LTSFT.rate


def _each_alone(paths: Any, score: Any, k: int) -> Any:
    sizes = {path: len(score(path)) for path in paths}
    counts = {path: k * size // sum(sizes.values()) for path, size in sizes.items()}
    counts[next(iter(counts))] += k - sum(counts.values())
    return {path: index for path in paths for _, index in TOP([path], score, counts[path]).items() if counts[path]}


def _where_it_was(host: Any, name: str, vector: Any, chosen: Any) -> Tensor:
    held = {path: host.model.get_parameter(path).detach().flatten() for path in chosen}
    return torch.cat([held[path][chosen[path]] for path in vector.paths if path in chosen])


MUTATIONS: dict[str, Mutation] = {
    "those that moved least": (_select, "top", lambda p, score, k: TOP(p, lambda path: 1 / (1e-9 + score(path)), k)),
    "a share of each tensor": (_select, "top", _each_alone),
    "the largest": (
        LTSFT, "moved", lambda self, host, name, _: lambda path: host.model.get_parameter(path).detach().abs().flatten()
    ),
    "no way back": (one_vector, "original", _where_it_was),
    "heads go on": (LTSFT, "rewind_heads", lambda self, host, name: None),
    "the optimizer remembers": (LTSFT, "forget", lambda self, optimizer: None),
    "one schedule": (LTSFT, "rate", lambda self, step, steps, plain: plain(step)),
    "a longer first phase": (LTSFT, "first", lambda self, steps: FIRST + 1),
    "no penalty": (LTSFT, "penalty", lambda self, host, name: None),
}  # fmt: skip
test_the_claim_fails_when_a_line_is_broken = fails_without(test_claim_the_run_is_the_written_one, lines=MUTATIONS)


@pytest.mark.parametrize("l1", ["dense", "sparse"])
def test_the_penalty_is_there_in_both_phases(l1: str) -> None:
    host = al.attach(task()[0], al.LTSFT(l1=2.0, density=0.2, norms=True))
    method: Any = host.methods["default"]
    if l1 == "sparse":
        with torch.no_grad():
            for p in host.parameters("default"):
                p.add_(torch.randn_like(p))
        method.choose(host, "default", make(host.parameters("default")))
        method.turn(host, "default")
    assert method.penalty(host, "default") == 0
    with torch.no_grad():
        for p in host.parameters("default"):
            p.add_(0.5)
    trained = sum(p.numel() for p in host.parameters("default"))
    total = sum(p.numel() for p in task()[0].parameters())
    assert float(method.penalty(host, "default").detach()) == pytest.approx(2.0 * 0.5 * trained / total, rel=1e-4)


# ---------------------------------------------------------------------- changes add up


def _tasks(seed: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """A linear layer and two tasks that each change few of its entries; rows to train on, and others to judge by."""
    torch.manual_seed(seed)

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y

    net, train, judge = One(), [], []
    for half in (0, 1):
        weight = net.layer.weight.detach().clone()
        weight.view(-1)[torch.randperm(1024)[:30]] += 0.3
        for rows, found, noise in ((64, train, 0.3), (256, judge, 0.0)):
            x = 0.5 * torch.randn(rows, 32)
            x[:, 16 * half : 16 * (half + 1)] *= 2
            found.append((x, x @ weight.T + noise * torch.randn(rows, 32)))
    return net, train, judge


def changes(seed: int, density: float) -> tuple[Any, list[Any], list[Any]]:
    """The net, what each task changed of it, and rows to judge by."""
    net, train, judge = _tasks(seed)
    start = net.layer.weight.detach().clone()
    found = []
    for x, y in train:
        twin = copy.deepcopy(net)
        ours(twin, x, y, steps=60, density=density, dense=30)
        found.append(twin.layer.weight.detach() - start)
    return net, found, judge


def loss_of_both(seed: int, density: float) -> float:
    net, found, judge = changes(seed, density)
    weight = net.layer.weight.detach() + sum(found)
    return sum(float(nn.functional.mse_loss(x @ weight.T, y)) for x, y in judge)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sparse_changes_of_two_tasks_add_up_better_than_dense_ones(seed: int) -> None:
    sparse, dense = loss_of_both(seed, 0.05), loss_of_both(seed, 0.999)
    assert sparse < 0.9 * dense, (sparse, dense)


def test_combining_two_adapters_is_that_sum() -> None:
    net, train, _ = _tasks(0)
    twin = copy.deepcopy(net)
    wanted = net.layer.weight.detach().double()
    for name, (x, y) in zip("ab", train, strict=True):
        one = copy.deepcopy(twin)
        made = ours(one, x, y, steps=10, density=0.05, dense=5)
        wanted = wanted + (one.layer.weight.detach().double() - twin.layer.weight.detach().double())
        host = al.host(net) or Host(net)
        host.activate()
        host.attach(made.methods["default"], name, saved=made.state_dict("default"), active=False)
    found = combine(host, ["a", "b"], [1.0, 1.0], into="both")
    assert found.entries <= 2 * int(0.05 * 1024)
    assert found.method == "lt_sft"
    with host.using("both"):
        torch.testing.assert_close(net.layer.weight.double(), wanted, rtol=0, atol=1e-6)
    with host.using():
        assert torch.equal(net.layer.weight, twin.layer.weight)


# ---------------------------------------------------------------------- the rest


def test_only_chosen_entries_move_and_all_is_undone() -> None:
    net, x, y = task()
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    host = ours(net, x, y, steps=28)  # 20 of them sparse, with momentum and decay
    vector = one_vector.of(host, "default")
    moved = 0
    for key, start in before.items():
        changed = (net.get_parameter(key) != start).flatten().nonzero().flatten()
        assert torch.isin(changed, vector.part(key).places()).all(), key
        moved += len(changed)
    total = sum(p.numel() for p in before.values())
    assert 0.9 * int(DENSITY * total) < moved <= int(DENSITY * total) == len(vector.values)
    assert host.summary().trainable == len(vector.values)
    host.detach("default")
    assert all(torch.equal(p, before[key]) for key, p in net.named_parameters())


@pytest.mark.parametrize("dense", [1, 3])
def test_a_stop_in_either_phase_changes_nothing(dense: int, tmp_path: Path) -> None:
    everywhere.check(al.LTSFT(dense=dense, l1=1.0, density=0.002), tmp_path)


def test_the_second_phase_has_moments_for_its_entries_alone() -> None:
    host = everywhere.attached(al.LTSFT(dense=2, density=0.05))
    loop = everywhere.own(host)
    loop.run()
    held = [v for state in loop._raw.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
    assert sum(v.numel() for v in held) == 2 * len(one_vector.of(host, "default").values)
    assert (
        host.methods["default"]
        .outcome(host, "default")["entries"]
        .startswith(f"{len(one_vector.of(host, 'default').values):,} (5.00%)")
    )
    assert not any(key.startswith("base.") for key in host.state_dict("default"))


def test_what_does_not_fit_is_refused() -> None:
    net = task()[0]
    host = al.attach(net, al.LTSFT(dense=4))
    method: Any = host.methods["default"]
    with pytest.raises(ConfigError, match=r"of this run's 4 steps 4 are in the first phase and 0 .*dense=4"):
        method.begin(host, "default", 4)
    with pytest.raises(NotTrainingError, match="how many steps"):
        method.before_step(host, "default", 0, make(host.parameters("default")))
    saved = host.state_dict("default")
    host.detach("default")
    with pytest.raises(AttachError, match=r"density=0\.0001 of .* leaves none"):
        al.attach(net, al.LTSFT(density=1e-4))
    with pytest.raises(AttachError, match="another base model"):
        Host(nn.ModuleDict({"body": nn.Linear(3, 3)})).attach(al.LTSFT(), saved=saved)
