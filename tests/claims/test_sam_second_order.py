"""SAM: of all masks of one size the chosen one lowers a quadratic loss most; only chosen entries change, and cost."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn

import adapterlab as al
import everywhere
from adapterlab.errors import AttachError, DataError, NotTrainingError
from adapterlab.methods.in_place import _chosen_parameters as _select
from adapterlab.methods.in_place.sam_second_order import SAMSecondOrder
from adapterlab.optim import adamw

CURVATURE, SIZE, K = 4.0, 20, 5


class Quadratic(nn.Module):
    """L(δ) = gᵀ δ + ½ h ‖δ‖², with the g of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.Embedding(1, SIZE)
        self.start = self.held.weight.detach()[0].clone()

    def forward(self, slope: Tensor, labels: Tensor) -> Any:
        moved = self.held(torch.zeros(1, dtype=torch.int64))[0] - self.start
        return SimpleNamespace(loss=slope[0] @ moved + CURVATURE / 2 * moved @ moved)


def _batches() -> tuple[list[dict[str, Tensor]], Tensor]:
    """Gradients of four batches and their sum: some entries have noise alone, which the sum cancels."""
    draw = torch.Generator().manual_seed(0)
    mean = torch.randn(SIZE, generator=draw)
    noise = 5 * torch.randn(SIZE, generator=draw).abs() * (mean.abs() < mean.abs().median())
    slopes = [mean / 4 + sign * noise for sign in (1, -1, 1, -1)]
    return [{"slope": slope[None], "labels": torch.zeros(1)} for slope in slopes], mean


def measure() -> tuple[float, float, float]:
    """By how much the best change of the chosen entries lowers the loss; the same for the best and a mean mask."""
    batches, slope = _batches()
    host = al.attach(Quadratic(), al.SAMSecondOrder(density=K / SIZE, clip=None))
    method: Any = host.methods["default"]
    method.prepare(host, "default", batches)
    make: Any = lambda p: torch.optim.SGD(p, lr=1 / CURVATURE)  # noqa: E731  one step of it is Newton's
    optimizer = method.optimizer(host, "default", make)
    whole = {"slope": slope[None], "labels": torch.zeros(1)}
    host.model(**whole).loss.backward()
    optimizer.step()
    decrease = -float(host.model(**whole).loss.detach())
    gains = slope.double() ** 2 / (2 * CURVATURE)
    every = torch.tensor(list(itertools.combinations(range(SIZE), K)))
    assert len(every) == 15_504
    masks = gains[every].sum(1)
    return decrease, float(masks.max()), float(masks.mean())


def test_claim_of_all_masks_the_chosen_one_lowers_the_loss_most() -> None:
    decrease, best, mean = measure()
    assert decrease == pytest.approx(best, rel=1e-5)
    assert decrease > 2 * mean


DENSITY, CLIP = 0.02, 0.1


def _reference(model: Any, batches: list[Any]) -> dict[str, Tensor]:
    """The authors' burn-in in float64: backward, clip all gradients together, add them up, forget them."""
    twin = copy.deepcopy(model).double()
    sums = {path: torch.zeros_like(p) for path, p in twin.named_parameters()}
    for batch in batches:
        twin.zero_grad()
        twin(**batch).loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), CLIP)
        for path, p in twin.named_parameters():
            sums[path] += 0 if p.grad is None else p.grad
    return sums


def _prepared(model: Any, batches: Any, **fields: Any) -> Any:
    host = al.attach(model, al.SAMSecondOrder(**{"density": DENSITY, "clip": CLIP, **fields}))
    host.methods["default"].prepare(host, "default", batches)
    return host


def _chosen(host: Any) -> dict[str, Tensor]:
    return {path: patch.index for path, patch in host.patches["default"].items()}


@pytest.mark.parametrize("family", ["bert-classes", "llama-tied"])
def test_the_choice_is_that_of_the_authors_algorithm(family: str, tiny: Any, batch_for: Any) -> None:
    model = tiny(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    batches = [batch_for(model, rows=3, seed=seed) for seed in (1, 2, 3)]
    sums = _reference(model, batches)
    chosen = _chosen(_prepared(model.train(), batches))
    for path, total in sums.items():
        k = int(DENSITY * total.numel())
        assert len(chosen.get(path, ())) == k, path
        if k:
            best = total.abs().flatten().topk(k).values
            got = total.abs().flatten()[chosen[path]].sort(descending=True).values
            torch.testing.assert_close(got, best, rtol=1e-4, atol=1e-12)


def _train(host: Any, batch: Any, steps: int, **options: Any) -> Any:
    optimizer = host.methods["default"].optimizer(host, "default", functools.partial(adamw, lr=1e-2, **options))
    for step in range(steps):
        host.methods["default"].before_step(host, "default", step, optimizer)
        optimizer.zero_grad()
        host.model(**batch).loss.backward()
        optimizer.step()
    host.model(**batch)  # the last step is written by the next forward pass
    return optimizer


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "t5"])
def test_only_chosen_entries_change_and_all_is_undone(family: str, tiny: Any, batch_for: Any) -> None:
    """Twenty steps with momentum and weight decay leave every other entry as it was, to the bit."""
    model = tiny(family)
    batch = batch_for(model)
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    host = _prepared(model, [batch])
    _train(host, batch, 20, weight_decay=0.1)
    chosen = _chosen(host)
    for path, p in model.named_parameters():
        if path in before:
            moved = (p != before[path]).flatten().nonzero().flatten()
            assert torch.isin(moved, chosen.get(path, moved[:0])).all(), path
    assert sum(int((p != before[path]).sum()) for path, p in model.named_parameters() if path in before) > 100
    host.merge()
    merged = {path: p.detach().clone() for path, p in model.named_parameters() if path in before}
    host.restore()
    assert all(torch.equal(model.get_parameter(path), value) for path, value in merged.items())
    host.detach("default")
    assert all(torch.equal(p, before[path]) for path, p in model.named_parameters())


def test_memory_is_that_of_the_chosen_entries(tiny: Any, batch_for: Any, tmp_path: Path) -> None:
    """Gradients, moments and the saved file grow with the chosen entries; no dense gradient is left over."""
    model = tiny("llama")
    batch = batch_for(model)
    host = _prepared(model, [batch])
    optimizer = _train(host, batch, 2)
    count, every = host.summary().trainable, sum(p.numel() for p in model.parameters())
    gradients = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    moments = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    assert (gradients, moments) == (count, 2 * count)
    assert count < 1.05 * DENSITY * every
    host.save(tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 12 * count + 400 * len(_chosen(host))  # a position, a value, a header


def test_saved_entries_come_back(tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    batch = batch_for(model)
    host = _prepared(model, [batch])
    _train(host, batch, 3)
    host.save(tmp_path / "adapter")
    again = al.load(tiny("llama-tied"), tmp_path / "adapter")
    assert torch.equal(logits(again.model, batch), logits(model, batch))
    again.methods["default"].prepare(again, "default", [])  # keeps what it has, and needs no data


def test_what_cannot_be_chosen_is_named(tiny: Any, batch_for: Any) -> None:
    model = tiny("bert-classes")
    with pytest.raises(AttachError, match=r"density=1e-05 leaves no entry .* largest has 4,096. Raise density to 0\.0"):
        al.attach(model, al.SAMSecondOrder(density=1e-5))
    host = al.attach(model, al.SAMSecondOrder(modules_to_save=("classifier",)))
    method: Any = host.methods["default"]
    with pytest.raises(DataError, match="one has only input_ids"):
        method.prepare(host, "default", [{"input_ids": torch.ones(1, 3, dtype=torch.int64)}])
    with pytest.raises(NotTrainingError, match=r"has not chosen its entries.*prepare\(host, 'default', batches\)"):
        method.before_step(host, "default", 0, adamw(host.parameters("default"), lr=1.0))


@pytest.mark.slow
def test_it_is_the_same_in_every_loop(tmp_path: Path) -> None:
    everywhere.check(al.SAMSecondOrder(density=0.05), tmp_path)


ACCUMULATE = _select.accumulate


def _each_clipped_alone(*args: Any, **options: Any) -> Any:
    host, parameters, batches, term = args
    clip = options.pop("clip") or 1e9
    return ACCUMULATE(
        host, parameters, batches, lambda g: term(g * _select.clipped(clip, float(g.norm()))), **options, clip=None
    )


def _one_budget(self: Any, parameters: Any) -> Any:
    return [(list(parameters), int(self.density * sum(p.numel() for p in parameters.values())))]


BROKEN: dict[str, Mutation] = {
    "squared before the sum": (SAMSecondOrder, "term", lambda self, gradient: gradient.square()),
    "without its sign": (SAMSecondOrder, "term", lambda self, gradient: gradient.abs()),
    "the lowest decrease": (SAMSecondOrder, "decrease", lambda self, summed: 1 / (1e-12 + summed.abs())),
    "the most positive": (SAMSecondOrder, "decrease", lambda self, summed: summed.clamp(min=0)),
    "one budget for all": (SAMSecondOrder, "budgets", _one_budget),
    "batches are not clipped": (_select, "clipped", lambda most, norm: 1.0),
    "each tensor is clipped by itself": (_select, "accumulate", _each_clipped_alone),
    "rows in place of batches": (_select, "labelled", lambda batches, count: list(_select._single(batches))),
    "the first batch alone": (_select, "labelled", lambda batches, count: batches[:1]),
    "dropout on while gradients are summed": (_select, "dropout_off", contextlib.nullcontext),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_claim_of_all_masks_the_chosen_one_lowers_the_loss_most,
    functools.partial(test_the_choice_is_that_of_the_authors_algorithm, "bert-classes"),
    lines=BROKEN,
)
