"""LoraHub: a few coefficients, searched with a few examples and without gradients, compose LoRAs for an unseen task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from saved_loras import at, put
from torch import Tensor

import adapterlab as al
from adapterlab.data import Collator
from adapterlab.engine.loss import Loss
from adapterlab.errors import AttachError, ConfigError, NotTrainingError
from adapterlab.methods.mixture import lorahub
from adapterlab.methods.mixture._library import mixed
from adapterlab.methods.mixture._search import Search
from adapterlab.methods.mixture.lorahub import LoRAHub
from adapterlab.train.config import Training
from adapterlab.train.loop import Listener, Loop, train

PARTS = [f"p{i}" for i in range(8)]
ALIKE = {part: {"r": 2, "alpha": 4.0 if part == "p1" else 2.0, "targets": ["q", "v", "down"]} for part in PARTS}
SECRET = dict.fromkeys(PARTS, 0.0) | {"p1": 0.9, "p4": -0.7, "p6": 0.5}
PATH = "model.layers.0.self_attn.q_proj"


def unseen(tiny: Any, count: int = 21) -> tuple[Any, list[dict[str, list[int]]]]:
    """A model with eight LoRAs on it, and rows in which a mixture of three of them speaks."""
    model = tiny("llama")
    put(model, ALIKE, size=0.35)
    host = al.attach(model, LoRAHub(adapters={p: p for p in PARTS}, coefficients=SECRET), "teacher")
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 128, (count, 4), generator=draw)
    with torch.no_grad():
        for _ in range(8):
            scores = (3 * model(ids).logits[:, -1]).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(scores, 1, generator=draw)], 1)
    host.detach("teacher")
    return host, [{"input_ids": row, "labels": [-100] * 4 + row[4:]} for row in ids.tolist()]


def cross_entropy(host: Any, rows: Any, *names: str) -> float:
    """Mean over all labels, with some adapters live."""
    with torch.no_grad(), host.using(*names):
        return float(Loss(host.model)(Collator(0)(rows)))


def search(
    host: Any, rows: Any, seed: int = 0, steps: int = 40, **settings: Any
) -> tuple[list[float], dict[str, float]]:
    """The value of every candidate, and the coefficients found."""
    values: list[float] = []

    class Curve(Listener):
        def stepped(self, loop: Loop, record: dict[str, Any]) -> None:
            values.append(loop._raw.value)  # type: ignore[attr-defined]

    if "hub" in host.methods:
        host.detach("hub")
    host.activate()
    host.attach(LoRAHub(adapters={p: p for p in PARTS}, **settings), "hub")
    train(host, "hub", rows, Training(steps=steps, batch_size=3, seed=seed), listeners=[Curve()])
    return values, host.methods["hub"].coefficients


@pytest.mark.slow
def test_claim(tiny: Any) -> None:
    """With five examples and 40 evaluations it ends below the model as it is, also on rows that it has not seen."""
    host, rows = unseen(tiny)
    gains, held = [], []
    for seed in range(5):
        values, found = search(host, rows[:5], seed)
        assert len(values) == 40
        best = cross_entropy(host, rows[:5], "hub") + 0.05 * sum(map(abs, found.values())) / 8
        assert values[0] == pytest.approx(cross_entropy(host, rows[:5]), abs=1e-4)
        assert min(values) == pytest.approx(best, abs=1e-4)
        gains.append(values[0] - best)
        held.append(cross_entropy(host, rows[5:]) - cross_entropy(host, rows[5:], "hub"))
    assert min(gains) >= 0
    assert sum(gain > 0 for gain in gains) >= 4
    assert sum(held) > 0


def test_the_objective(tiny: Any) -> None:
    """Every value is the mean cross-entropy of all examples, whatever the batches, and 0.05 times the mean |w|."""
    host, rows = unseen(tiny, 7)
    seen: list[tuple[dict[str, float], float]] = []

    class Watch(Listener):
        def stepped(self, loop: Loop, record: dict[str, Any]) -> None:
            search: Any = loop._raw
            seen.append((dict(host.methods["hub"].coefficients), search.value))
            assert search.held["value"] == min(value for _, value in seen)

    host.attach(LoRAHub(adapters={p: p for p in PARTS}, examples=None, coefficients=SECRET), "hub")
    train(host, "hub", rows, Training(steps=12, batch_size=3), listeners=[Watch()])
    assert not any(seen[0][0].values())
    values = [value for _, value in seen]
    assert min(values) < values[0]
    for point, value in seen:  # between steps the adapter is the best one so far
        if value == min(values):
            host.detach("hub")
            host.attach(LoRAHub(adapters={p: p for p in PARTS}, coefficients=point), "hub")
            wanted = cross_entropy(host, rows, "hub") + 0.05 * sum(map(abs, point.values())) / 8
            assert value == pytest.approx(wanted, abs=1e-5)
            assert any(point.values())
            assert max(map(abs, point.values())) <= 1.5
    assert seen[-1][0] == next(point for point, value in seen if value == min(values))


def change(tiny: Any, coefficients: dict[str, float], mix: str = "factors") -> tuple[Tensor, Any]:
    """ΔW at one module in float64, and the factors of the parts."""
    model = tiny("llama").double()
    put(model, ALIKE)
    method = LoRAHub(adapters={p: p for p in PARTS}, coefficients=coefficients, mix=mix)  # type: ignore[arg-type]
    host = al.attach(model, method, "hub")
    part: Any = host.adapters("hub")[PATH]
    return part.delta().detach(), at(host, PATH, PARTS)


def test_formula(tiny: Any) -> None:
    """The double sum with all products of one adapter's B with another's A; quadratic, so that the sign is lost."""
    w = dict(zip(PARTS, torch.linspace(-1.2, 1.4, 8).tolist(), strict=True))
    found, parts = change(tiny, w)
    wanted = sum(w[i] * w[j] * s * b @ a for i, (_, b, s) in parts.items() for j, (a, _, _) in parts.items())
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(change(tiny, {p: -v for p, v in w.items()})[0], found)
    a, b, s = parts["p1"]
    one = dict.fromkeys(PARTS, 0.0) | {"p1": 0.5}
    torch.testing.assert_close(change(tiny, one)[0], 0.25 * s * b @ a)


def test_deltas(tiny: Any) -> None:
    """The other form: Σ w_i s_i B_i A_i."""
    w = dict(zip(PARTS, torch.linspace(-1.2, 1.4, 8).tolist(), strict=True))
    found, parts = change(tiny, w, "deltas")
    torch.testing.assert_close(found, sum(w[p] * s * b @ a for p, (a, b, s) in parts.items()))


def walk(
    steps: int, *, start: float = 0.0, seed: int = 0, state: Any = None
) -> tuple[Search, list[Tensor], list[float]]:
    """Search for the minimum of Σ (x − 1)² in eight dimensions."""
    torch.manual_seed(seed)
    asked: list[Tensor] = []
    found = Search(torch.full((8,), start), lambda point: asked.append(point.clone()), bound=1.5, sigma=0.5)
    if state is not None:
        found.load_state_dict(state)
    sigmas = []
    for _ in range(steps):
        found.ask()
        for part in (0.25, 0.75):
            found.hear(part * float((found.point - 1).square().sum()))
        found.judge()
        found.step()
        sigmas.append(found.held["sigma"])
    found.rest()
    return found, asked, sigmas


def test_the_search() -> None:
    """It starts at 0, stays in its box, never keeps the worse, and σ follows the one-fifth rule."""
    found, asked, sigmas = walk(150)
    assert found.held["first"] == 8.0
    assert not asked[0].any()
    assert float(torch.stack(asked).abs().max()) == 1.5
    values = [float((point - 1).square().sum()) for point in asked[:150]]
    assert found.held["value"] == pytest.approx(min(values))
    assert found.held["value"] < 0.1
    assert torch.equal(found.point, found.held["best"])
    best = values[0]
    for before, after, value in zip(sigmas, sigmas[1:], values[1:], strict=False):
        assert after / before == pytest.approx(2.0 if value < best else 2**-0.25)
        best = min(best, value)
    assert all(torch.equal(*pair) for pair in zip(asked, walk(150)[1], strict=True))
    assert not torch.equal(asked[1], walk(2, seed=1)[1][1])
    started = walk(2, start=0.5)
    assert torch.equal(started[1][1], torch.full((8,), 0.5))
    assert started[2] == [0.5, 0.5]


def test_a_search_goes_on_where_it_was() -> None:
    whole, half = walk(30)[0], walk(12)[0]
    again, asked, _ = walk(18, seed=9, state=half.state_dict())
    assert torch.equal(again.point, whole.point)
    assert again.held["value"] == whole.held["value"]
    assert len(asked) >= 18


def test_a_candidate_without_a_loss_is_none(tiny: Any) -> None:
    """A mixture under which the loss overflows loses, and the search goes on."""
    host, rows = unseen(tiny, 5)
    points = []

    def burst(module: Any, args: Any, out: Tensor) -> Tensor | None:
        points.append(host.methods["hub"].coefficients)
        return out * float("nan") if any(points[-1].values()) else None

    handle = host.module(PATH).register_forward_hook(burst)
    values, found = search(host, rows, steps=6)
    handle.remove()
    assert min(values[1:]) > 0.9e30
    assert values[0] < 10
    assert not any(found.values())
    assert any(any(point.values()) for point in points)


def test_what_cannot_be_searched(tiny: Any) -> None:
    model = tiny("llama")
    put(model, {"a": {"r": 2, "targets": ["q"]}, "b": {"r": 3, "targets": ["q"]}, "c": {"r": 2, "targets": ["v"]}})
    for parts, message in ((("a", "b"), r"rank 2 and adapters\['b'\] rank 3"), (("a", "c"), "does not.*mix=deltas")):
        with pytest.raises(AttachError, match=message):
            al.attach(model, LoRAHub(adapters={p: p for p in parts}), "hub")
        al.attach(model, LoRAHub(adapters={p: p for p in parts}, mix="deltas"), "hub").detach("hub")
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    host = al.attach(model, LoRAHub(adapters={"a": "a"}), "hub")
    with pytest.raises(ConfigError, match=r"1 evaluation\(s\) are no search.*training.steps"):
        train(host, "hub", rows, Training(steps=1))
    host.adapters("a")[PATH].B.data.zero_()
    host.adapters("a")["model.layers.1.self_attn.q_proj"].B.data.zero_()
    with pytest.raises(NotTrainingError, match="all 4 candidates have the loss"):
        train(host, "hub", rows, Training(steps=4))
    with pytest.raises(ConfigError, match="same parts as adapters: a"):
        LoRAHub(adapters={"a": "a"}, coefficients={"b": 1.0})
    with pytest.raises(ConfigError, match=r"leave the box of bound=1\.5"):
        LoRAHub(adapters={"a": "a"}, coefficients={"a": 2.0})


def test_no_gradient_is_kept(tiny: Any) -> None:
    """Nothing on the model asks for a gradient, and dropout and the like are off."""
    host, rows = unseen(tiny, 5)
    modes: list[tuple[bool, bool]] = []
    handle = host.module(PATH).register_forward_hook(
        lambda module, args, out: modes.append((module.training, torch.is_grad_enabled()))
    )
    search(host, rows, steps=3)
    handle.remove()
    assert not host.parameters("hub")
    assert modes
    assert not any(any(mode) for mode in modes[-3:])


def _rule(better: float, worse: float) -> Mutation:
    return (Search, "widened", staticmethod(lambda improved: better if improved else worse))


def _mixture(change: Any) -> Mutation:
    return (lorahub, "mixed", lambda updates, weights, mix: change(updates, weights, mix))


def _takes_all(self: Search, closure: Any = None) -> None:
    self.held["value"] = float("inf")
    _step(self)


_step, _candidate = Search.step, Search.candidate
LINES: dict[str, Mutation] = {
    "deltas for factors": _mixture(lambda u, w, mix: mixed(u, w, "deltas")),
    "factors for deltas": _mixture(lambda u, w, mix: mixed(u, w, "factors")),
    "A is not weighed": _mixture(
        lambda u, w, mix: (sum(x.A for x in u.values()), mixed(u, w, mix)[1]) if mix == "factors" else mixed(u, w, mix)
    ),
    "no scales": _mixture(lambda u, w, mix: mixed({k: v._replace(scale=1.0) for k, v in u.items()}, w, mix)),
    "no penalty": (LoRAHub, "size", lambda self, point: 0.0),
    "a sum of |w|": (LoRAHub, "size", lambda self, point: self.penalty_weight * float(point.abs().sum())),
    "squares of w": (LoRAHub, "size", lambda self, point: self.penalty_weight * float(point.square().mean())),
    "other rows in each step": (LoRAHub, "rows_of_run", lambda self, count: None),
    "no box": (
        Search, "candidate",
        lambda self, count: self.held["best"] + self.held["sigma"] * self.drawn(count, self.held["best"]) * (count > 0),
    ),
    "the model as it is is no candidate": (Search, "candidate", lambda self, count: _candidate(self, count + 1)),
    "the worse are kept": (Search, "step", _takes_all),
    "σ stays": _rule(1.0, 1.0),
    "σ only shrinks": _rule(2**-0.25, 2**-0.25),
    "σ grows without success": _rule(0.5, 2**0.25),
    "the last candidate stays": (Search, "rest", lambda self: self.point),
}  # fmt: skip
test_broken_lines_are_caught = fails_without(
    test_formula, test_deltas, test_the_search, test_the_objective, lines=LINES
)
