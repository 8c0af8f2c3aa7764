"""The suite fails for methods that are broken in known ways, each by the check that is made for it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from adapterlab import registry
from adapterlab.core.adapter import Delta
from adapterlab.core.method import LayerMethod, Method
from adapterlab.core.site import Site
from adapterlab.errors import AdapterlabError, AttachError, MergeError
from adapterlab.hosts import Host
from adapterlab.testing import CHECKS, Case, attempt, checks_for, outcome, run
from adapterlab.testing.__main__ import main


class Sound(LayerMethod):
    """A small method without a fault: ΔW = B A."""

    id: ClassVar[str] = "toy_sound"
    formula: ClassVar[str] = "2 (in + out)"

    class Layer(Delta):
        start = 0.0

        def __init__(self, method: Method, site: Site):
            super().__init__(site)
            out, in_ = site.shape
            self.A, self.B = site.parameter(2, in_), site.parameter(out, 2)
            nn.init.normal_(self.A)
            nn.init.constant_(self.B, self.start)

        def delta(self) -> Tensor:
            return self.B @ self.A


class StartsElsewhere(Sound):
    id: ClassVar[str] = "toy_start"

    class Layer(Sound.Layer):
        start = 0.01


class CountsWrong(Sound):
    id: ClassVar[str] = "toy_count"
    formula: ClassVar[str] = "2 in + out"


class MergesTwice(Sound):
    id: ClassVar[str] = "toy_merge"

    class Layer(Sound.Layer):
        def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return weight + 2 * self.delta().to(weight.dtype), bias


class RestoresRounded(Sound):
    """Writes into the base's own storage when it merges, so nothing brings the bits back."""

    id: ClassVar[str] = "toy_restore"

    class Layer(Sound.Layer):
        def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            merged = super().merged(weight, bias)
            self.site.module.weight.data.add_(1e-3)
            return merged


class LeaksIntoBase(Sound):
    id: ClassVar[str] = "toy_leak"

    def after_step(self, host: Host, name: str, step: int, optimizer: Any) -> None:
        next(p for p in host.model.parameters() if not p.requires_grad).data.mul_(1.001)


class ForgetsTensor(Sound):
    id: ClassVar[str] = "toy_forgets"

    class Layer(Sound.Layer):
        def __init__(self, method: Method, site: Site):
            super().__init__(method, site)
            factor = self.A.data
            del self.A
            self.register_buffer("A", factor, persistent=False)


class ForgetsStep(Sound):
    """Keeps something that training depends on outside the adapter and the optimizer."""

    id: ClassVar[str] = "toy_resume"
    calls: ClassVar[Any] = itertools.count(1)

    def after_backward(self, host: Host, name: str, step: int) -> None:
        factor = 1 / next(self.calls)
        for p in host.parameters(name):
            p.grad = p.grad * factor + factor


class LeavesHook(Sound):
    id: ClassVar[str] = "toy_detach"

    def attach(self, host: Host, name: str) -> None:
        super().attach(host, name)
        host.model.register_forward_hook(_nothing)


def _nothing(*_: Any) -> None:
    return None


class LooksAhead(Sound):
    """Adds the mean over all positions, so the answer depends on how the sequence is cut or padded."""

    id: ClassVar[str] = "toy_mean"

    class Layer(Sound.Layer):
        def forward(self, x: Tensor) -> Tensor:
            share = super().forward(x)
            return share + 5 * share.mean(-2, keepdim=True)


class MixesRows(Sound):
    id: ClassVar[str] = "toy_rows"

    class Layer(Sound.Layer):
        def forward(self, x: Tensor) -> Tensor:
            share = super().forward(x)
            return share.mean(0, keepdim=True).expand_as(share)


class Forgetful(Sound):
    """Scales by a number that differs between a forward pass and its recomputation."""

    id: ClassVar[str] = "toy_recompute"
    calls: ClassVar[Any] = itertools.count(1)

    class Layer(Sound.Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + next(Forgetful.calls) % 7)


class Idle(Sound):
    """One of its tensors never gets a gradient."""

    id: ClassVar[str] = "toy_idle"

    class Layer(Sound.Layer):
        def delta(self) -> Tensor:
            return self.B @ self.A.detach()


class BreaksGraph(Sound):
    id: ClassVar[str] = "toy_graph"

    class Layer(Sound.Layer):
        def forward(self, x: Tensor) -> Tensor:
            share = super().forward(x)
            return share if float(share.detach().sum()) < 1e9 else share * 2


class Undescribed(Sound):
    id: ClassVar[str] = "toy_fields"
    size: int = 3


class RefusesVaguely(Sound):
    """Raises the wrong kind of error for what it cannot do."""

    id: ClassVar[str] = "toy_refusal"

    class Layer(Sound.Layer):
        def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            raise ValueError("no")


BROKEN: list[tuple[type[Method], str]] = [
    (StartsElsewhere, "start"),
    (CountsWrong, "count"),
    (MergesTwice, "merge"),
    (MergesTwice, "merge_bf16"),
    (RestoresRounded, "merge"),
    (LeaksIntoBase, "only_declared"),
    (ForgetsTensor, "save_load"),
    (ForgetsTensor, "served"),
    (ForgetsStep, "resume"),
    (LeavesHook, "detach"),
    (LooksAhead, "generate"),
    (LooksAhead, "padding"),
    (MixesRows, "rows"),
    (Forgetful, "checkpointing"),
    (Idle, "gradients"),
    (BreaksGraph, "compile"),
    (Undescribed, "fields"),
    (RefusesVaguely, "merge"),
    *((method, "smoke") for method in (StartsElsewhere, Idle, ForgetsTensor, LeavesHook)),  # each of its parts
]


@pytest.fixture
def known() -> Iterator[Callable[[type[Method]], Case]]:
    """`known(cls)`: register a method for the time of a test."""
    added: list[str] = []

    def register(cls: type[Method]) -> Case:
        registry.register(cls)
        added.append(cls.id)
        return Case(cls)

    yield register
    for id in added:
        del registry._registered[id]


@pytest.mark.parametrize(("method", "name"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_check_fails_for_what_it_is_made_for(method: type[Method], name: str, known: Any) -> None:
    case = known(method)
    assert CHECKS[name] in checks_for(method)
    found = outcome(CHECKS[name], case)
    assert found.status == "failed", str(found)
    assert not found.ok
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        attempt(CHECKS[name], case)


def test_sound_method_passes_everything(known: Any) -> None:
    known(Sound)
    outcomes = run(Sound)
    assert {o.check for o in outcomes} == {check.name for check in checks_for(Sound)}
    assert not [str(o) for o in outcomes if o.status != "passed"]


def test_refusal_of_the_right_kind_is_an_outcome(known: Any) -> None:
    class Refusing(Sound):
        id: ClassVar[str] = "toy_refusing"

        def attach(self, host: Host, name: str) -> None:
            raise AttachError("toy_refusing fits nothing. Choose another method.")

    case = known(Refusing)
    refused = outcome(CHECKS["rows"], case)
    assert refused.ok
    assert (refused.status, refused.detail.split(":")[0]) == ("refused", "AttachError")
    assert outcome(CHECKS["save_load"], case).status == "failed"  # nothing can refuse to be saved
    with pytest.raises(AdapterlabError):
        attempt(CHECKS["save_load"], case)


def test_checks_are_chosen_by_capabilities() -> None:
    class Still(Sound):
        id: ClassVar[str] = "toy_still"
        trains: ClassVar[bool] = False
        starts_at_base: ClassVar[bool] = False

    chosen = {check.name for check in checks_for(Still)}
    assert not {"start", "loss_falls", "resume", "trainer", "peft"} & chosen
    assert {"save_load", "detach", "merge", "generate"} <= chosen
    assert "trains" in CHECKS["resume"].excluded(Still)
    assert MergeError in CHECKS["merge"].refuses
    assert torch.is_grad_enabled()


def test_the_command_shows_what_checks_say(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["testing", "prompt_tuning", "--family", "llama", "--checks", "start", "merge"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert "start" in lines[0]
    assert "merge" in lines[1]
    for wrong, message in ((["nothing_such"], "no method"), (["lora", "--checks", "mergee"], "Nearest: merge")):
        monkeypatch.setattr(sys, "argv", ["testing", *wrong])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert message in capsys.readouterr().err
