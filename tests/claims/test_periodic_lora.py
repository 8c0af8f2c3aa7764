"""PeriodicLoRA: the run is the written one, unloading changes nothing, and the sum learns what one LoRA cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adapterlab as al
import everywhere
import links_by_hand as hand
from adapterlab.convert import export_lora
from adapterlab.methods.schedule import _restarts
from adapterlab.methods.schedule.periodic_lora import PeriodicLoRA
from links_by_hand import with_right as on

STARTS = [0, 15, 30, 45]


def method(**fields: Any) -> Any:
    return al.PeriodicLoRA(**{"r": hand.R, "alpha": hand.ALPHA, "links": 4, "targets": ["0"], **fields})


def compressed(step: int) -> float:
    return hand.plain(step % 15 * 4)


def is_written() -> bool:
    """With and without momentum, and with neither optimizer nor schedule begun anew."""
    found = []
    for kept in (0.0, 0.4):
        host, _, a = hand.ours(method(momentum=kept))
        found.append((host, hand.written(a, STARTS, compressed, kept=kept)))
    host, _, a = hand.ours(method(reset_optimizer=False, reset_scheduler=False))
    found.append((host, hand.written(a, STARTS, hand.plain, forget=lambda moments: None)))
    return all(bool((hand.weight(host) - theirs).abs().max() < 1e-4) for host, theirs in found)


def unloading_changes() -> float:
    """Largest change of an output when a stage ends, for several momenta."""
    changes = []
    for kept in (0.0, 0.3, 0.9):
        host, *_ = hand.ours(method(momentum=kept), until=10)
        x = hand.task()[1]
        before, optimizer = host.model(x).detach(), torch.optim.SGD(host.parameters("default"), lr=0.1)
        host.methods["default"].restart(host, "default", 1, optimizer)
        changes.append(float((host.model(x) - before).abs().max().detach()))
    return max(changes)


def holds() -> bool:
    """It is the written run, nothing changes when a stage ends, and it learns more than one LoRA."""
    host, losses, _ = hand.ours(method(links=4), steps=240)
    _, alone, _ = hand.ours(method(links=1), steps=240)
    total = hand.weight(host) - hand.task()[0][0].weight.detach()
    return is_written() and unloading_changes() < 1e-5 and hand.rank(total) > hand.R and losses[-1] < alone[-1]


def test_claim_it_is_the_written_run_and_unloading_changes_nothing() -> None:
    assert holds()


LAYER = _restarts.Restarts.Layer


def _both_scaled(monkeypatch: Any) -> None:
    right = LAYER.pass_on

    def pass_on(self: Any, after: int, kept: float) -> None:
        right(self, after, kept)
        if kept:
            self.A.mul_(kept)

    monkeypatch.setattr(LAYER, "pass_on", pass_on)


def _drawn_anew(monkeypatch: Any) -> None:
    right = LAYER.pass_on

    def pass_on(self: Any, after: int, kept: float) -> None:
        right(self, after, kept)
        self.A.copy_(self.init.start(_restarts.Place(self.site, len(self.A), self.scale)).A)

    monkeypatch.setattr(LAYER, "pass_on", pass_on)


MUTATIONS: dict[str, Any] = {
    "nothing is unloaded": lambda m: m.setattr(LAYER, "past", lambda self: 0 * self.delta().detach()),
    "all is unloaded and a part stays": on(
        LAYER, "pass_on", lambda right, self, after, kept: (
            saved := self.B.clone(), right(self, after, 0.0), self.B.copy_(kept * saved)
        ),
    ),
    "the share that stays is unloaded": on(
        LAYER, "pass_on", lambda right, self, after, kept: right(self, after, 1 - kept if kept else 0.0)
    ),
    "both factors are scaled": _both_scaled,
    "A is drawn anew beside a part that stays": _drawn_anew,
    "momentum is ignored": on(LAYER, "pass_on", lambda right, self, after, kept: right(self, after, 0.0)),
    "A stays": on(LAYER, "pass_on", lambda right, self, *args: self.A.copy_((self.A.clone(), right(self, *args))[0])),
    "stages overwrite each other": on(LAYER, "pass_on", lambda right, self, after, kept: right(self, 0, kept)),
    "the optimizer is never reset": lambda m: m.setattr(PeriodicLoRA, "forget", lambda self, optimizer, p: None),
    "the optimizer is always reset": lambda m: m.setattr(PeriodicLoRA, "forget", _restarts.Restarts.forget),
    "the schedule is never reset": lambda m: m.setattr(
        PeriodicLoRA, "rate", lambda self, step, steps, plain: plain(step)
    ),
    "the schedule is always reset": on(
        PeriodicLoRA, "rate", lambda right, self, *args: right(self.replace(reset_scheduler=True), *args)
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", list(MUTATIONS))
def test_the_claim_fails_with(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[broken](monkeypatch)
    assert not holds()


def test_with_momentum_the_export_holds_what_was_merged() -> None:
    host, *_ = hand.ours(method(momentum=0.5))
    x = hand.task()[1]
    wanted = host.model(x)
    assert export_lora(host, "default").error < 1e-6
    with host.using("lora"):
        assert torch.allclose(host.model(x), wanted, atol=1e-4)


def test_start_and_count(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("gpt2")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.PeriodicLoRA(r=4))
    assert torch.equal(logits(model, batch), base)
    assert host.summary().trainable == sum(4 * sum(a.site.shape) for a in host.adapters("default").values())


@pytest.mark.parametrize(
    "method", [al.PeriodicLoRA(links=2, momentum=0.5, reset_optimizer=False, reset_scheduler=False)]
)
def test_other_settings_are_alike_in_every_loop(method: al.Method, tmp_path: Path) -> None:
    everywhere.check(method, tmp_path)
