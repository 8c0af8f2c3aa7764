"""FAR: the run is the written one, and frozen nodes cost neither gradients nor moments nor products."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import adapterlab as al
import everywhere
from adapterlab.engine import sparse
from adapterlab.engine.sparse import Lines
from adapterlab.errors import AttachError, ConfigError, NotTrainingError
from adapterlab.hosts import Host
from adapterlab.methods.in_place.far import FAR
from adapterlab.testing.models import batch as batch_for
from adapterlab.testing.models import tiny

STEPS, FIRST, SHARE, LR = 6, 3, 0.4, 1e-2
JOINT = {"llama": ("gate_proj", "up_proj"), "gpt2": ()}
LAYERS = {"llama": ("gate_proj", "up_proj", "down_proj"), "gpt2": ("c_fc", "mlp.c_proj")}


def train(host: Host, batch: Any, steps: int = STEPS, decay: float = 0.0) -> float:
    method: Any = host.methods["default"]
    method.begin(host, "default", steps)
    optimizer = method.optimizer(host, "default", lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=decay))
    for step in range(steps):
        method.before_step(host, "default", step, optimizer)
        optimizer.zero_grad()
        loss = host.model(**batch).loss
        loss.backward()
        optimizer.step()
        method.after_step(host, "default", step, optimizer)
    host.refresh("default")
    return float(loss.detach())


def ffn(model: Any, family: str) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if path.endswith(LAYERS[family])}


def written(model: Any, family: str, batch: Any, rewind: bool) -> dict[str, Tensor]:
    """Train the layers whole, score their rows, go back, and train with the gradients of other rows at zero."""
    layers = ffn(model.requires_grad_(False), family)
    start = {path: copy.deepcopy(layer.state_dict()) for path, layer in layers.items()}
    parameters = [p.requires_grad_(True) for layer in layers.values() for p in layer.parameters()]

    def run(optimizer: Any, steps: int, masks: dict[str, Tensor] | None = None) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            for path, mask in (masks or {}).items():
                layers[path].weight.grad *= mask if family == "gpt2" else mask[:, None]  # Conv1D stores [in, out]
                if family == "gpt2":
                    layers[path].bias.grad *= mask
            optimizer.step()

    def scores(path: str) -> Tensor:
        moved = (layers[path].weight - start[path]["weight"]).detach().abs()
        return (
            moved.sum(0) + (layers[path].bias - start[path]["bias"]).detach().abs()
            if family == "gpt2"
            else moved.sum(1)
        )

    run(torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0), FIRST)
    masks = {}
    for path in layers:
        parent, _, leaf = path.rpartition(".")
        together = [f"{parent}.{other}" for other in JOINT[family]] if leaf in JOINT[family] else [path]
        total = torch.stack([scores(other) for other in together]).sum(0)
        masks[path] = torch.zeros(len(total))
        masks[path][total.argsort(descending=True)[: -int(-SHARE * len(total) // 1)]] = 1
    for path, layer in layers.items() if rewind else ():
        layer.load_state_dict(start[path])
    run(torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0), STEPS - FIRST, masks)
    return {f"{path}.{leaf}": p.detach() for path, layer in layers.items() for leaf, p in layer.named_parameters()}


_WRITTEN: dict[Any, dict[str, Tensor]] = {}


def holds(family: str, rewind: bool) -> bool:
    batch = batch_for(tiny(family))
    if (family, rewind) not in _WRITTEN:
        _WRITTEN[family, rewind] = written(tiny(family).train(), family, batch, rewind)
    host = al.attach(tiny(family).train(), al.FAR(retention=SHARE, priming=FIRST, rewind=rewind))
    train(host, batch)
    wanted = _WRITTEN[family, rewind]
    return max(float((host.model.get_parameter(k) - v).abs().max()) for k, v in wanted.items()) < 1e-5


def test_claim_the_run_is_the_written_one() -> None:
    assert holds("llama", rewind=True)
    assert holds("gpt2", rewind=False)


COUNT, MOVED, GROUPS = FAR.count, FAR.moved, FAR.groups


def _signed(self: Any, host: Any, name: str, site: Any, _: Any) -> Tensor:
    change = site.module.weight.detach() - host.patches[name][f"{site.path}.weight"].original
    return site.matrix(change).sum(1).abs()


def _without_bias(self: Any, host: Any, name: str, site: Any, _: Any) -> Tensor:
    change = site.module.weight.detach() - host.patches[name][f"{site.path}.weight"].original
    return site.matrix(change).abs().sum(1) * (1 if site.bias is None else 0)


def _gradients(change: Any) -> Any:
    plain = sparse._Outputs.backward

    def backward(ctx: Any, grad: Tensor) -> Any:
        y, x, rows, weight, *bias = plain(ctx, grad)
        return y, x, rows, *change(weight, *bias)

    return staticmethod(backward)


MUTATIONS: dict[str, Mutation] = {
    "those that moved least": (FAR, "moved", lambda *args: -MOVED(*args)),
    "signs cancel": (FAR, "moved", _signed),
    "scores without the bias": (FAR, "moved", _without_bias),
    "gate and up choose for themselves": (FAR, "groups", lambda self, sites: [[site] for site in sites]),
    "fewer rows": (FAR, "count", lambda self, out: COUNT(self, out) - 1),
    "never rewound": (FAR, "keeps_whole", lambda self: True),
    "always rewound": (FAR, "keeps_whole", lambda self: False),
    "longer priming": (FAR, "first", lambda self, steps: FIRST + 1),
    "gradients of other rows": (sparse._Outputs, "backward", _gradients(lambda w, *b: (w.flip(0), *b))),
    "no gradient of the bias": (sparse._Outputs, "backward", _gradients(lambda w, *b: (w, *(0 * g for g in b)))),
    "values stay outside of the weight": (Lines, "write", lambda self: None),
}  # fmt: skip
test_the_claim_fails_when_a_line_is_broken = fails_without(test_claim_the_run_is_the_written_one, lines=MUTATIONS)


def _bytes(model: Any, optimizer: Any) -> tuple[int, int]:
    """Of gradients and of moments."""
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
    return gradients, sum(v.nbytes for v in held)


def costs(retention: float | None) -> tuple[int, int, int]:
    """Bytes of gradients and of moments, and operations of a backward pass; None: the layers train whole."""
    model = tiny("llama").train()
    batch = batch_for(model)
    host = al.attach(model, al.FAR(retention=retention or 0.4, priming=1 if retention else 2))
    method: Any = host.methods["default"]
    method.begin(host, "default", 3)
    optimizer = method.optimizer(host, "default", lambda p: torch.optim.AdamW(p, lr=LR))
    for step in range(2):
        optimizer.zero_grad()
        method.before_step(host, "default", step, optimizer)
        loss = model(**batch).loss
        with FlopCounterMode(display=False) as counted:
            loss.backward()
        optimizer.step()
    return *_bytes(model, optimizer), counted.get_total_flops()


def test_claim_at_four_tenths_of_the_nodes_gradients_and_moments_are_four_tenths() -> None:
    few, whole = costs(0.4), costs(None)
    assert few[0] / whole[0] == pytest.approx(0.4, abs=0.02)
    assert few[1] / whole[1] == pytest.approx(0.4, abs=0.02)
    model = tiny("llama")
    tokens = batch_for(model)["input_ids"].numel()
    numbers = sum(m.weight.numel() for m in ffn(model, "llama").values())
    saved = (whole[2] - few[2]) / (2 * tokens * numbers)  # of the products that make gradients of these weights
    assert saved == pytest.approx(0.6, abs=0.02)


test_the_cost_is_more_when_a_line_is_broken = fails_without(
    test_claim_at_four_tenths_of_the_nodes_gradients_and_moments_are_four_tenths,
    lines={
        "the optimizer remembers the first phase": (FAR, "forget", lambda self, optimizer: None),
        "more rows than asked for": (FAR, "count", lambda self, out: COUNT(self, out) + 2),
        "the rest goes on training": (
            FAR,
            "turn",
            lambda self, host, name: [p.requires_grad_(True) for a in self.held(host, name) for p in a.parameters()],
        ),
    },
)


def test_few_nodes_end_near_all_of_them() -> None:
    """Chosen nodes learn nearly what all do, from the same rows in as many steps after priming."""
    model = tiny("llama").train()
    batch = batch_for(model, rows=4)
    first = float(model(**batch).loss.detach())
    few = train(al.attach(model, al.FAR(retention=0.4, priming=2)), batch, 32)
    every = train(al.attach(tiny("llama").train(), al.FAR(retention=1.0, priming=2)), batch, 32)
    assert first - few > 0.85 * (first - every), (first, few, every)


@pytest.mark.parametrize("selection", ["movement", "random"])
def test_frozen_rows_do_not_move_and_all_is_undone(selection: Any) -> None:
    model = tiny("llama").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    host = al.attach(model, al.FAR(retention=SHARE, priming=2, selection=selection))
    train(host, batch_for(model), 22, decay=0.1)  # 20 of them after priming, with momentum
    rows = {path: layer.rows for path, layer in host.adapters("default").items()}
    for key, start in before.items():
        path, _, leaf = key.rpartition(".")
        moved = (model.state_dict()[key] != start).nonzero()[:, 0].unique()
        assert torch.equal(moved, rows[path]) if path in rows and leaf == "weight" else not len(moved), key
    assert all(len(found) == -int(-SHARE * host.module(path).out_features // 1) for path, found in rows.items())
    for i in (0, 1):
        lead = f"model.layers.{i}.mlp"
        same = torch.equal(rows[f"{lead}.gate_proj"], rows[f"{lead}.up_proj"])
        assert same, "gate and up choose one set"
    saved = host.state_dict("default")
    assert {key.rpartition(".")[2] for key in saved} == {"rows", "weight"}
    assert sum(v.numel() for k, v in saved.items() if k.endswith("weight")) == host.summary().trainable
    host.detach("default")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_random_rows_depend_on_the_seed_and_need_no_priming() -> None:
    drawn = []
    for seed in (0, 0, 1):
        host = al.attach(tiny("llama"), al.FAR(selection="random", retention=0.25, seed=seed))
        host.methods["default"].begin(host, "default", 1)
        assert not any(patch.entire for patch in host.patches["default"].values())
        drawn.append([layer.rows.tolist() for layer in host.adapters("default").values()])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("rewind", [True, False])
def test_saved_rows_come_back_and_merge(rewind: bool, tmp_path: Path) -> None:
    model = tiny("gpt2").train()
    batch = batch_for(model)
    host = al.attach(model, al.FAR(retention=SHARE, priming=2, rewind=rewind))
    train(host, batch)
    model.eval()
    wanted = model(**batch).logits
    host.save(tmp_path / "a")
    assert any(key.startswith("base.") for key in host.state_dict("default")) != rewind
    other = tiny("gpt2")
    base = {key: value.clone() for key, value in other.state_dict().items()}
    again = al.load(other, tmp_path / "a")
    again.merge()  # before any forward pass
    assert torch.equal(other(**batch).logits, wanted)
    again.restore()
    again.detach("default")
    assert all(torch.equal(other.state_dict()[key], value) for key, value in base.items())


@pytest.mark.parametrize("priming", [1, 3])
@pytest.mark.parametrize("rewind", [True, False])
def test_a_stop_in_either_phase_changes_nothing(priming: int, rewind: bool, tmp_path: Path) -> None:
    everywhere.check(al.FAR(priming=priming, rewind=rewind, retention=0.25), tmp_path)


def test_what_does_not_fit_is_refused() -> None:
    model = tiny("llama")
    host = al.attach(model, al.FAR(priming=9))
    method: Any = host.methods["default"]
    with pytest.raises(ConfigError, match=r"of this run's 5 steps 5 are in the first phase and 0 .*priming=9"):
        method.begin(host, "default", 5)
    with pytest.raises(NotTrainingError, match="how many steps"):
        method.before_step(host, "default", 0, torch.optim.SGD(host.parameters("default"), lr=1.0))
    saved = host.state_dict("default")
    key = next(key for key in saved if key.endswith("rows"))
    saved[key] = saved[key] + 1000
    with pytest.raises(AttachError, match="reach 999, and it has 48 here"):
        Host(tiny("llama")).attach(al.FAR(), saved=saved)
    with pytest.raises(AttachError, match="no feed-forward layers that are linear"):
        al.attach(tiny("mixtral"), al.FAR())
