"""Losses that adapters emit count as the task's loss does: against gradients that are written out.

That all loops make the same of them, over parts of a step, processes and stops, is shown with the methods of
test_dynamic_methods_everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

import adapterlab as al
import everywhere
from adapterlab.errors import TrainingError
from adapterlab.ops import cross_entropy
from adapterlab.testing.models import tiny
from adapterlab.train import Loop, Training
from everywhere import COLLATE, NAME, ROWS, SAME, Emitting, apart, foreign, state_of

WEIGHT = Emitting.model_fields["weight"].default


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with everywhere.quick():
        yield


def begun(*targets: str) -> Any:
    """A model whose updates are not zero."""
    model = tiny("qwen2").train()
    torch.manual_seed(0)
    host = al.attach(model, Emitting(r=4, alpha=8.0, targets=targets), NAME)
    with torch.no_grad():
        for p in host.parameters(NAME):
            p.add_(torch.randn(p.shape) * 0.1)
    return host


def loop(host: Any, **options: Any) -> Loop:
    settings = {"steps": 1, "batch_size": 2, "accumulation": 2, "lr": 1e-2, "clip": None, "packing": False, **options}
    return Loop(host, NAME, ROWS, Training(**settings), prepare=False)


def gradients(host: Any, **options: Any) -> dict[str, Tensor]:
    """What the first step of our own loop has summed up."""
    found: dict[str, Tensor] = {}

    def told(self: Any, host: Any, name: str, step: int) -> None:
        found.update({key: p.grad.double() for key, p in host.named_parameters(name).items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Emitting, "after_backward", told)
        loop(host, **options).step()
    return found


@functools.cache
def wanted() -> dict[str, Tensor]:
    """In float64: Σ over batches of (Σ CE + n_batch · Σ over modules of c · mean over real tokens of |y|²/d) / n."""
    host = begun("q", "down")
    batches = [COLLATE([ROWS[i] for i in part]) for part in loop(host).sampler.step(0)]
    host.model.double()
    parts, seen = host.adapters(NAME), {}
    for path in parts:
        host.module(path).register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0]}))
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total: Any = 0.0
    for batch in batches:
        given, bears = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"][:, 1:]
        logits = host.model(**given).logits[:, :-1]
        total = total + F.cross_entropy(logits.flatten(0, 1), bears.flatten(), reduction="sum") / labels
        for path, part in parts.items():
            y = part.scale * (seen[path][batch["attention_mask"] == 1] @ part.A.T @ part.B.T)
            total = total + WEIGHT * y.square().mean() * int((bears != -100).sum()) / labels
    named = host.named_parameters(NAME)
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"recompute": "cheap"}, {"recompute": "full"}], ids=str)
def test_our_own_loop_has_the_gradients_that_are_written_out(options: dict[str, Any]) -> None:
    found = gradients(begun("q", "down"), **options)
    for key, value in wanted().items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_a_head_that_is_computed_in_portions_emits_the_mean_over_all_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients(begun("head"), batch_size=4, accumulation=1)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 3 * 128)
    found = gradients(begun("head"), batch_size=4, accumulation=1)
    for key, value in whole.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=key)


@functools.cache
def ours() -> tuple[Any, Any]:
    host = begun("q", "down")
    before = state_of(host)
    everywhere.own(host).run()
    return before, state_of(host)


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "SFT", "SFT selective"])
def test_checkpointing_that_a_trainer_switches_on_changes_nothing(kind: str, tmp_path: Path) -> None:
    host = begun("q", "down")
    how: dict[str, Any] = {"use_reentrant": kind == "reentrant"}
    if "SFT" in kind:
        how = {"selective": True} if "selective" in kind else {}
        trainer = everywhere.trl(host, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=how)
    else:
        trainer = foreign(host, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=how)
    trainer.train()
    assert apart(state_of(host), ours()[1], ours()[0]) < SAME


class OwnLoss(everywhere.PlainTrainer):
    """Makes its loss of logits, although the model returns one."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        out = model(**inputs)
        loss: Tensor = out.logits.square().mean()
        return loss


@pytest.mark.parametrize("kind", ["own loss", "smoothing", "dft"])
def test_a_trainer_that_would_lose_them_is_refused(kind: str, tmp_path: Path) -> None:
    host = begun("q")
    trainer: Trainer
    if kind == "dft":
        trainer = everywhere.trl(host, tmp_path, loss_type="dft")
    elif kind == "smoothing":
        trainer = foreign(host, tmp_path, label_smoothing_factor=0.1)
    else:
        trainer = foreign(host, tmp_path, kind=OwnLoss)
    with pytest.raises(TrainingError, match=r"loss of its own beside the task's"):
        trainer.train()
    assert host.state.losses is None
