"""Child-Tuning: only a child network moves, drawn in every step or chosen once by Fisher information."""

from __future__ import annotations

import contextlib
import copy
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
from adapterlab.errors import AttachError, NotTrainingError
from adapterlab.methods.in_place import _chosen_parameters as _select
from adapterlab.methods.in_place.child_tuning import Child, ChildTuning
from adapterlab.optim import adamw

P = 0.3


def _make(p: Any, **options: Any) -> Any:
    return adamw(p, **{"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.1, **options})


def _prepared(model: Any, batches: Any, **fields: Any) -> Any:
    host = al.attach(model, al.ChildTuning(**{"share": P, **fields}))
    host.methods["default"].prepare(host, "default", batches)
    return host


def _train(host: Any, batches: list[Any], **options: Any) -> Any:
    method = host.methods["default"]
    optimizer = method.optimizer(host, "default", functools.partial(_make, **options))
    for step, batch in enumerate(batches):
        method.before_step(host, "default", step, optimizer)
        optimizer.zero_grad()
        host.model(**batch).loss.backward()
        optimizer.step()
    host.model(**batches[0])  # the last step of chosen entries is written by the next forward pass
    return optimizer


# ---------------------------------------------------------------------- the claim


def _noisy(count: int, seed: int, noise: float) -> dict[str, Tensor]:
    """Rows of nine of fifteen tokens, whose class is the one that most of them are of; some classes are wrong."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 18, (count, 9), generator=draw)
    labels = torch.stack([(ids % 3 == c).sum(1) for c in range(3)], 1).argmax(1)
    wrong = torch.rand(count, generator=draw) < noise
    return {"input_ids": ids, "labels": torch.where(wrong, torch.randint(0, 3, (count,), generator=draw), labels)}


def _accuracy(model: Any, method: Any, seed: int) -> float:
    """On clean rows, after fifteen epochs on a hundred of which a fifth have any class."""
    rows, clean = _noisy(100, seed, 0.2), _noisy(300, 999, 0.0)
    batches = [{key: value[i : i + 20] for key, value in rows.items()} for i in range(0, 100, 20)]
    host = al.attach(model, method)
    method.prepare(host, "default", batches)
    _train(host, batches * 15, lr=3e-3, weight_decay=0.0)
    with torch.no_grad():
        found = model(input_ids=clean["input_ids"]).logits.argmax(1)
    return float((found == clean["labels"]).double().mean())


def measure(make: Any, seeds: Any) -> tuple[float, float]:
    """Mean accuracies of mode d with what lies outside the blocks, as in the authors' code, and of full fine-tuning."""
    child = [_accuracy(make("bert-classes"), al.ChildTuning(share=P, rest=True), seed) for seed in seeds]
    full = [_accuracy(make("bert-classes"), al.Full(), seed) for seed in seeds]
    return sum(child) / len(child), sum(full) / len(full)


@pytest.mark.slow
def test_claim_d_generalises_better_from_few_noisy_rows(tiny: Any) -> None:
    child, full = measure(tiny, (1, 2, 3))
    assert child > full + 0.03


def test_the_entries_with_the_least_information_generalise_worse(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN["the lowest scores"])
    child, full = measure(tiny, (1,))
    assert child < full - 0.03


# ---------------------------------------------------------------------- f: another child in every step

SIZE, STEPS = 20_000, 6


def _vector() -> tuple[Any, nn.Parameter]:
    model = nn.Sequential(nn.Linear(SIZE, 1, bias=False))
    host = al.attach(model, al.ChildTuning(mode="f", share=P))
    return host, model[0].weight


def test_claim_f_a_share_p_moves_and_the_mean_step_is_kept() -> None:
    """Of the step u each entry makes M u / p: mean u, variance (1 − p) / p u², and the bits of the others stay."""
    host, weight = _vector()
    twin = nn.Parameter(weight.detach().clone())
    optimizer, plain = host.methods["default"].optimizer(host, "default", _make), _make([twin])
    draw = torch.Generator().manual_seed(0)
    masks = []
    for _ in range(STEPS):
        before = weight.detach().clone()
        twin.data.copy_(before)
        weight.grad = twin.grad = torch.randn(1, SIZE, generator=draw) + 1
        optimizer.step()
        plain.step()
        made, whole = (weight.detach() - before).double(), (twin.detach() - before).double()
        masks.append(made != 0)
        torch.testing.assert_close(made[masks[-1]], whole[masks[-1]] / P, rtol=1e-3, atol=1e-7)
        share, ratio = float(masks[-1].double().mean()), made / whole
        assert share == pytest.approx(P, abs=4 * (P * (1 - P) / SIZE) ** 0.5)
        assert float(ratio.mean()) == pytest.approx(1, abs=0.05)
        assert float(ratio.var()) == pytest.approx((1 - P) / P, rel=0.05)
    for first, second in itertools.pairwise(masks):
        assert float((first & second).double().mean()) == pytest.approx(P * P, abs=0.02)  # drawn anew


def test_f_with_masked_gradients_is_the_authors_algorithm(tiny: Any, batch_for: Any) -> None:
    """In float64: g ← M g / p, then AdamW; momentum and decay move what the mask leaves out."""
    model = tiny("bert-classes").double()
    batches = [batch_for(model, seed=seed) for seed in range(4)]
    twin = copy.deepcopy(model)
    host = al.attach(model, al.ChildTuning(mode="f", share=P, masked="gradient", seed=3))
    _train(host, batches)
    named = dict(twin.named_parameters())
    reference = torch.optim.AdamW(list(named.values()), lr=1e-2, eps=1e-6, weight_decay=0.1)
    for step, batch in enumerate(batches):
        reference.zero_grad()
        twin(**batch).loss.backward()
        for path, p in named.items():
            if p.grad is not None:
                p.grad *= Child(P, 3, f"base.{path}", "gradient").mask(step, p.grad) / P
        reference.step()
    for path, p in model.named_parameters():
        torch.testing.assert_close(p, named[path], rtol=1e-7, atol=1e-9)


def test_masks_follow_from_seed_tensor_and_step(tiny: Any) -> None:
    like = torch.zeros(40, 50)
    draws = [Child(P, seed, key, "update").mask(step, like) for seed, key, step in
             ((0, "a", 0), (0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))]  # fmt: skip
    assert torch.equal(draws[0], draws[1])
    for other in draws[2:]:
        assert float((draws[0] & other).float().mean()) == pytest.approx(P * P, abs=0.03)
    host = al.attach(tiny("llama"), al.ChildTuning(mode="f"))
    with pytest.raises(NotTrainingError, match=r"AdamW masks nothing.*optimizer\(host, 'default', make\)"):
        host.methods["default"].before_step(host, "default", 0, adamw(host.parameters("default"), lr=1.0))


def test_a_child_leaves_out_what_is_not_finite() -> None:
    host, weight = _vector()
    optimizer = host.methods["default"].optimizer(host, "default", _make)
    key = next(iter(host.named_parameters("default")))
    mask = Child(P, 0, key, "update").mask(0, weight)
    weight.grad = torch.where(mask, 1.0, float("inf"))
    optimizer.step()
    assert bool(weight.isfinite().all())


def test_f_in_half_precision_and_undone(tiny: Any, batch_for: Any) -> None:
    model = tiny("llama-tied").bfloat16()
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    host = al.attach(model, al.ChildTuning(mode="f", share=P))
    _train(host, [batch_for(model, seed=seed) for seed in range(3)])
    assert all(not torch.equal(p, before[path]) for path, p in model.named_parameters())
    host.detach("default")
    assert all(torch.equal(p, before[path]) for path, p in model.named_parameters())


# ---------------------------------------------------------------------- d: one child, chosen from data

CLIP = 0.02


def _fisher(model: Any, batches: list[Any]) -> dict[str, Tensor]:
    """The authors' scores in float64: each tensor's gradient of a batch clipped by itself, squared, averaged."""
    twin = copy.deepcopy(model).double()
    inside = {path: p for path, p in twin.named_parameters() if "layer" in path.lower().replace("layernorm", "")}
    sums = {path: torch.zeros_like(p) for path, p in inside.items()}
    for batch in batches:
        twin.zero_grad()
        twin(**batch).loss.backward()
        for path, p in inside.items():
            nn.utils.clip_grad_norm_(p, CLIP)
            sums[path] += p.grad**2 / len(batches)
    return sums


def _chosen(host: Any) -> dict[str, Tensor]:
    return {path: patch.index for path, patch in host.patches["default"].items() if patch.index is not None}


@pytest.mark.parametrize("family", ["bert-classes", "llama"])
def test_d_chooses_what_the_authors_algorithm_chooses(family: str, tiny: Any, batch_for: Any) -> None:
    model = tiny(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    batches = [batch_for(model, rows=3, seed=seed) for seed in (1, 2, 3)]
    scores = _fisher(model, batches)
    chosen = _chosen(_prepared(model.train(), batches, clip=CLIP))
    every = torch.cat([s.flatten() for s in scores.values()])
    assert chosen.keys() <= scores.keys()
    got = torch.cat([scores[path].flatten()[index] for path, index in chosen.items()])
    assert len(got) == int(P * len(every))
    torch.testing.assert_close(
        got.sort(descending=True).values, every.topk(len(got)).values, rtol=1e-3, atol=1e-14
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "t5"])
def test_d_only_the_child_changes_and_all_is_undone(family: str, tiny: Any, batch_for: Any) -> None:
    """Twenty steps with momentum and weight decay leave every other entry as it was, to the bit."""
    model = tiny(family)
    batch = batch_for(model)
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    host = _prepared(model, [batch])
    optimizer = _train(host, [batch] * 20)
    chosen, names = _chosen(host), set(before)
    for path, p in model.named_parameters():
        if path in names:
            moved = (p != before[path]).flatten().nonzero().flatten()
            assert torch.isin(moved, chosen.get(path, moved[:0])).all(), path
            assert path not in chosen or len(moved) > 0.5 * len(chosen[path])
    count = host.summary().trainable
    gradients = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    moments = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    assert (gradients, moments) == (count, 2 * count)
    host.merge()
    host.restore()
    host.detach("default")
    assert all(torch.equal(p, before[path]) for path, p in model.named_parameters())


def test_d_with_the_rest_trains_it_whole_and_comes_back(tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> None:
    model = tiny("bert-classes")
    batch = batch_for(model)
    inside = sum(p.numel() for block in model.bert.encoder.layer for p in block.parameters())
    every = sum(p.numel() for p in model.parameters())
    host = _prepared(model, [batch], rest=True)
    assert host.summary().trainable == int(P * inside) + every - inside
    _train(host, [batch] * 2)
    host.save(tmp_path / "adapter")
    again = al.load(tiny("bert-classes"), tmp_path / "adapter")
    assert torch.equal(logits(again.model, batch), logits(model, batch))
    again.methods["default"].prepare(again, "default", [])  # keeps what it has, and needs no data


def test_what_cannot_train_is_named(tiny: Any) -> None:
    model = tiny("bert-classes")
    with pytest.raises(AttachError, match=r"share=1e-06 of the [\d,]+ entries of the blocks leaves none"):
        al.attach(model, al.ChildTuning(share=1e-6))
    host = al.attach(model, al.ChildTuning(rest=True))
    with pytest.raises(NotTrainingError, match="has not chosen its entries"):
        host.methods["default"].before_step(host, "default", 0, adamw(host.parameters("default"), lr=1.0))


def test_d_is_the_same_in_every_loop(tmp_path: Path) -> None:
    everywhere.check(al.ChildTuning(share=0.1), tmp_path)


ACCUMULATE, TOP, UPDATE = _select.accumulate, _select.top, Child.update


def _squared_late(*args: Any, **options: Any) -> Any:
    host, parameters, batches, _ = args
    return {path: s.square() for path, s in ACCUMULATE(host, parameters, batches, lambda g: g, **options).items()}


def _only_gradients(self: Any, g: Any, state: Any, p: Any) -> Any:
    mask = self.mask(state["step"], g)
    state["step"] += 1
    return self.scaled(g, mask), None


def _one_mask(self: Any, g: Any, state: Any, p: Any) -> Any:
    state["step"] = 0
    return UPDATE(self, g, state, p)


BROKEN: dict[str, Mutation] = {
    "one mask for the whole run": (Child, "update", _one_mask),
    "the gradient is masked in place of the update": (Child, "update", _only_gradients),
    "nothing is masked": (Child, "update", lambda self, g, state, p: (g, None)),
    "without 1 / p": (Child, "scaled", lambda self, values, mask: values * mask),
    "1 − p moves": (Child, "mask", lambda self, step, like: torch.rand(like.shape) >= self.share),
    "a mask that is not drawn": (Child, "mask", lambda self, step, like: torch.arange(SIZE)[None] % 10 < 3),
    "squared after the sum": (_select, "accumulate", _squared_late),
    "not clipped": (_select, "clipped", lambda most, norm: 1.0),
    "the lowest scores": (_select, "top", lambda paths, score, k: TOP(paths, lambda p: 1 / (1e-20 + score(p)), k)),
    "embeddings and head too": (ChildTuning, "blocks", lambda self, host: host.base_parameters()),
    "rows in place of batches": (_select, "labelled", lambda batches, count=None: list(_select._single(batches))),
    "dropout on while it scores": (_select, "dropout_off", contextlib.nullcontext),
    "fewer entries": (ChildTuning, "budget", lambda self, blocks: 10),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_claim_f_a_share_p_moves_and_the_mean_step_is_kept,
    functools.partial(test_d_chooses_what_the_authors_algorithm_chooses, "bert-classes"),
    lines=BROKEN,
)
