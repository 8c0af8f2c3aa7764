"""Chain of LoRA: the run is the written one, and each link learns some of what those before it left over."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adapterlab as al
import links_by_hand as hand
from adapterlab.errors import ConfigError
from adapterlab.methods.schedule import _restarts
from adapterlab.methods.schedule.chain_of_lora import ChainOfLoRA
from links_by_hand import with_right as on

STARTS = [0, 20, 40]


def method(**fields: Any) -> Any:
    return al.ChainOfLoRA(**{"r": hand.R, "alpha": hand.ALPHA, "links": 3, "targets": ["0"], **fields})


def left_over(links: int) -> float:
    """What of the task is not learned after a number of links, with the same number of steps in all."""
    host, *_ = hand.ours(method(links=links), steps=360)
    model, x, target = hand.task()
    return float((x @ hand.weight(host).T - target).norm() / (model(x).detach() - target).norm())


def holds() -> bool:
    """It is the written run, each link has rank r, and more links leave less."""
    host, _, a = hand.ours(method())
    theirs = hand.written(a, STARTS, lambda step: hand.plain(step % 20 * 3))
    layer: Any = host.adapters("default")["0"]
    links = zip(layer.A_past.split(hand.R), layer.B_past.split(hand.R, 1), strict=True)
    ranks = {hand.rank(b @ a) for a, b in links}
    found = [left_over(links) for links in (1, 2, 3)]
    return bool((hand.weight(host) - theirs).abs().max() < 1e-4) and ranks == {hand.R} and found == sorted(found)[::-1]


def test_claim_it_is_the_written_run_and_links_leave_less_and_less() -> None:
    assert holds()


LAYER = _restarts.Restarts.Layer
MUTATIONS: dict[str, Any] = {
    "no knot is tied": lambda m: m.setattr(LAYER, "past", lambda self: 0 * self.delta().detach()),
    "tied without the scale": on(LAYER, "past", lambda right, self: right(self) / self.scale),
    "A stays": on(LAYER, "pass_on", lambda right, self, *args: self.A.copy_((self.A.clone(), right(self, *args))[0])),
    "B stays": on(LAYER, "pass_on", lambda right, self, *args: self.B.copy_((self.B.clone(), right(self, *args))[0])),
    "links overwrite each other": on(LAYER, "pass_on", lambda right, self, after, kept: right(self, 0, kept)),
    "the old optimizer": lambda m: m.setattr(ChainOfLoRA, "forget", lambda self, optimizer, p: None),
    "one schedule for all": lambda m: m.setattr(ChainOfLoRA, "rate", lambda self, step, steps, plain: plain(step)),
    "a schedule that is not compressed": lambda m: m.setattr(
        ChainOfLoRA, "rate", lambda self, step, steps, plain: plain(self.place_in(step, steps)[1])
    ),
    "parts that are not equal": on(
        ChainOfLoRA, "starts", lambda right, self, steps: [0, *(start - 2 for start in right(self, steps)[1:])]
    ),
}


@pytest.mark.parametrize("broken", list(MUTATIONS))
def test_the_claim_fails_with(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[broken](monkeypatch)
    assert not holds()


def test_more_links_than_steps_are_refused() -> None:
    host = al.attach(hand.task()[0], method())
    with pytest.raises(ConfigError, match=r"links=3 need a step each, and of this run's \d+ 2 are left.*1 to 2 links"):
        host.methods["default"].begin(host, "default", 2)


def test_start_and_count(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("gpt2")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.ChainOfLoRA(r=4))
    assert torch.equal(logits(model, batch), base)
    assert host.summary().trainable == sum(4 * sum(a.site.shape) for a in host.adapters("default").values())
