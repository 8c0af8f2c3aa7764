"""Fish-Dip: the run is the written one, and the samples that were fitted worst are fitted better than by one mask."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor

import adapterlab as al
import everywhere
from adapterlab.errors import AttachError, NotTrainingError
from adapterlab.hosts import Host
from adapterlab.methods.in_place import _chosen_parameters as _select
from adapterlab.methods.in_place import _one_vector as one_vector
from adapterlab.methods.in_place import fish_dip
from adapterlab.methods.in_place.fish_dip import FishDip
from adapterlab.optim import adamw, transforms
from adapterlab.testing.models import batch as batch_for
from adapterlab.testing.models import tiny

STEPS, EVERY, DENSITY, HARD, LR, EPS = 7, 2, 0.02, 3, 1e-2, 1e-6
FIELDS: dict[str, Any] = {"density": DENSITY, "every": EVERY, "least": HARD}


def rows() -> dict[str, Tensor]:
    return batch_for(tiny("llama"), rows=8, seed=3)


def ours(model: Any, batch: Any, steps: int = STEPS, lr: float = LR, decay: float = 0.1, **fields: Any) -> Host:
    host = al.attach(model.train(), al.FishDip(**{**FIELDS, **fields}))
    method: Any = host.methods["default"]
    method.prepare(host, "default", [batch])
    optimizer = method.optimizer(host, "default", functools.partial(adamw, lr=lr, eps=EPS, weight_decay=decay))
    for step in range(steps):
        method.before_step(host, "default", step, optimizer)
        optimizer.zero_grad()
        host.model(**batch).loss.backward()
        optimizer.step()
    host.refresh("default")
    return host


def written(rewind: bool) -> tuple[dict[str, Tensor], list[set[int]]]:
    """Dense tensors: masks of the hardest rows, and AdamW on each entry by itself; also the masks."""
    model, batch = tiny("llama").train(), rows()
    named = dict(model.named_parameters())
    start = {key: p.detach().clone() for key, p in named.items()}
    state = {key: {k: torch.zeros(p.shape, dtype=torch.float64) for k in ("m", "v", "t")} for key, p in named.items()}
    masks, mask = [], {key: torch.zeros(p.shape, dtype=torch.bool) for key, p in named.items()}
    for step in range(STEPS):
        if step % EVERY == 0:
            single = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]
            with torch.no_grad():
                losses = torch.stack([model(**row).loss for row in single])
            sums = {key: torch.zeros_like(p) for key, p in named.items()}
            for i in losses.argsort(descending=True)[:HARD].tolist():
                grads = torch.autograd.grad(model(**single[i]).loss, list(named.values()))
                for key, g in zip(named, grads, strict=True):
                    sums[key] += g**2
            flat = torch.cat([s.flatten() for s in sums.values()])
            kept = torch.zeros(len(flat), dtype=torch.bool)
            kept[flat.topk(int(DENSITY * len(flat))).indices] = True
            masks.append(set(kept.nonzero().flatten().tolist()))
            parts = kept.split([p.numel() for p in named.values()])
            for (key, p), part in zip(named.items(), parts, strict=True):
                now = part.view(p.shape)
                for held in state[key].values():
                    held[now != mask[key]] = 0  # who joins or leaves begins anew
                if rewind:
                    with torch.no_grad():
                        p[mask[key] & ~now] = start[key][mask[key] & ~now]
                mask[key] = now
        model.zero_grad()
        model(**batch).loss.backward()
        for key, p in named.items():
            held, on, g = state[key], mask[key], p.grad.double()
            held["t"] += 1
            held["m"] = 0.9 * held["m"] + 0.1 * g
            held["v"] = 0.999 * held["v"] + 0.001 * g**2
            root = (held["v"] / (1 - 0.999 ** held["t"])).sqrt() + EPS
            update = held["m"] / (1 - 0.9 ** held["t"]) / root + 0.1 * p.detach()
            with torch.no_grad():
                p[on] = (p.double() - LR * update).to(p.dtype)[on]
            for kept_state in held.values():
                kept_state[~on] = 0
    return {key: p.detach() for key, p in named.items()}, masks


@functools.cache
def reference(rewind: bool) -> tuple[dict[str, Tensor], list[set[int]]]:
    return written(rewind)


def holds(rewind: bool = False) -> bool:
    found = ours(tiny("llama"), rows(), rewind=rewind).model
    wanted, _ = reference(rewind)
    return max(float((found.get_parameter(key) - value).abs().max()) for key, value in wanted.items()) < 1e-4


@pytest.mark.parametrize("rewind", [False, True])
def test_claim_the_run_is_the_written_one(rewind: bool) -> None:
    assert holds(rewind)


TOP, ACCUMULATE, REORDER, LOSSES, LEAVING = (
    _select.top, _select.accumulate, fish_dip.reorder, FishDip.losses, FishDip.leaving
)  # fmt: skip


def _one_count(self: Any, g: Tensor) -> Any:
    return {"step": 0, "mean": torch.zeros_like(g), "square": torch.zeros_like(g)}


def _each_alone(paths: Any, score: Any, k: int) -> Any:
    sizes = {path: score(path).numel() for path in paths}
    counts = {path: k * size // sum(sizes.values()) for path, size in sizes.items()}
    counts[next(iter(counts))] += k - sum(counts.values())
    return {path: index for path in paths if counts[path] for _, index in TOP([path], score, counts[path]).items()}


def _squared_late(host: Any, parameters: Any, batches: Any, _: Any, **options: Any) -> Any:
    return {p: s.square() for p, s in ACCUMULATE(host, parameters, batches, lambda g: g, **options).items()}


def _values_wrong(self: Any, vector: Any, index: Tensor) -> Any:
    left, values = LEAVING(self, vector, index)
    return left, 0.9 * values


MUTATIONS: dict[str, Mutation] = {
    "the easiest rows": (FishDip, "losses", lambda *args: -LOSSES(*args)),
    "all rows": (FishDip, "hardest", lambda self, batches: 8),
    "the lowest scores": (_select, "top", lambda p, s, k: TOP(p, lambda path: 1 / (1e-12 + s(path).flatten()), k)),
    "a share of each tensor": (_select, "top", _each_alone),
    "squared after the sum": (_select, "accumulate", _squared_late),
    "joiners take over moments": (fish_dip, "reorder", lambda held, source, kept: REORDER(held, source, kept | True)),
    "moments stay in their places": (fish_dip, "reorder", lambda held, source, kept: None),
    "all begin anew": (fish_dip, "reorder", lambda held, source, kept: REORDER(held, source, kept & False)),
    "joiners count the steps of the run": (transforms.Adam, "init", _one_count),
    "leavers lose what they learned": (FishDip, "leaving", lambda self, vector, index: (index[:0], index[:0].float())),
    "leavers keep something else": (FishDip, "leaving", _values_wrong),
}  # fmt: skip
test_the_claim_fails_when_a_line_is_broken = fails_without(
    functools.partial(test_claim_the_run_is_the_written_one, False), lines=MUTATIONS
)


def test_masks_move_and_all_that_ever_trained_is_kept() -> None:
    host = ours(tiny("llama"), rows())
    masks = reference(False)[1]
    vector = one_vector.of(host, "default")
    assert set(vector.index.tolist()) == masks[-1]
    assert set(vector.index.tolist()) | set(vector.left_index.tolist()) == set.union(*masks)
    assert len(vector.left_index) > 0.05 * len(vector.index)
    few = one_vector.of(ours(tiny("llama"), rows(), rewind=True), "default")
    assert few.left_index is None


def measure(seed: int) -> tuple[float, float]:
    """Mean loss of the tenth of the rows that are fitted worst, with one mask and with one that moves."""
    model = tiny("llama", seed=seed)
    batch = batch_for(model, rows=64, length=6, seed=seed, padding=False)
    found = []
    for every in (10**6, 5):
        host = ours(copy.deepcopy(model), batch, 60, 1e-2, 0.0, every=every, density=0.01, least=6)
        host.model.eval()
        single = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(64)]
        with torch.no_grad():
            losses = torch.stack([host.model(**row).loss for row in single])
        found.append(float(losses.topk(6).values.mean()))
    return found[0], found[1]


@pytest.mark.slow
def test_claim_the_worst_rows_are_fitted_better_than_by_one_mask() -> None:
    static, moving = measure(0)
    assert moving < 0.9 * static, (static, moving)


@pytest.mark.parametrize("rewind", [False, True])
def test_only_what_was_chosen_moves_and_all_is_undone(rewind: bool) -> None:
    model = tiny("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    host = ours(model, rows(), 20, rewind=rewind)
    owned = {key: patch.index for key, patch in host.patches["default"].items()}
    for key, p in model.named_parameters():
        if key in before:
            moved = (p != before[key]).flatten().nonzero().flatten()
            assert torch.isin(moved, owned[key]).all(), key
    host.detach("default")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_saved_entries_come_back_without_the_rows(tmp_path: Path) -> None:
    host = ours(tiny("llama"), rows())
    wanted = host.model.eval()(**rows()).logits
    host.save(tmp_path / "a")
    again = al.load(tiny("llama"), tmp_path / "a")
    assert not any("pool" in key for key in again.state_dict("default"))
    again.merge()
    assert torch.equal(again.model(**rows()).logits, wanted)
    again.restore()
    method: Any = again.methods["default"]
    with pytest.raises(NotTrainingError, match=r"has no rows to choose its entries by.*prepare"):
        method.before_step(again, "default", EVERY, adamw(again.parameters("default"), lr=1.0))
    index = one_vector.of(again, "default").index.clone()
    method.prepare(again, "default", [rows()])  # keeps what it has until it is time
    assert torch.equal(one_vector.of(again, "default").index, index)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.slow
def test_a_stop_changes_nothing(every: int, tmp_path: Path) -> None:
    everywhere.check(al.FishDip(every=every, density=0.05, pool=8), tmp_path)


def test_what_does_not_fit_is_refused() -> None:
    host = al.attach(tiny("llama"), al.FishDip())
    method: Any = host.methods["default"]
    with pytest.raises(NotTrainingError, match="no rows to choose"):
        method.before_step(host, "default", 0, adamw(host.parameters("default"), lr=1.0))
    with pytest.raises(AttachError, match=r"density=1e-07 of .* leaves none"):
        al.attach(tiny("bert"), al.FishDip(density=1e-7))
    with pytest.raises(AttachError, match="another base model"):
        Host(tiny("bert")).attach(al.FishDip(), saved=host.state_dict("default"))


def test_a_head_is_paid_from_the_budget() -> None:
    model = tiny("bert")
    total, head = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.classifier.parameters())
    batch = batch_for(model, rows=4)
    host = al.attach(model, al.FishDip(density=0.02, modules_to_save=("classifier",)))
    host.methods["default"].prepare(host, "default", [batch])
    assert host.summary().trainable == int(0.02 * total)
    extra = al.attach(tiny("bert"), al.FishDip(density=0.02, modules_to_save=("classifier",), charge_head=False))
    assert len(one_vector.of(extra, "default").values) == int(0.02 * (total - head))
