"""Trainers of TRL multiply with the weight of the head instead of calling it: adapters there count all the same."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import adapterlab as al
import everywhere
from adapterlab.core.adapter import Adapter
from adapterlab.core.method import Method
from adapterlab.errors import ConfigError
from everywhere import apart, attached, own, state_of

METHODS: dict[str, Method] = {
    "factors": al.LoRA(r=2, targets=["lm_head", "q"]),
    "magnitudes": al.DoRA(r=2, targets=["lm_head"]),
    "a copy": al.LoRA(r=2, targets=["v"], modules_to_save=("lm_head",)),
    "nothing there": al.LoRA(r=2, targets=["q", "v"]),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_stands_at_the_head_is_trained(method: Method, tmp_path: Path) -> None:
    start = state_of(attached(method))
    loop = own(attached(method))
    loop.run()
    host = attached(method)
    everywhere.trl(host, tmp_path).train()
    assert apart(state_of(host), state_of(loop.host), start) < 1e-4


class Bent(Adapter):
    """Nothing that a weight could say."""

    not_linear: ClassVar[str] = "the output is bent"

    def __init__(self, site: Any):
        super().__init__(site)
        self.gain = site.parameter(1)

    def around(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)


class Around(Method):
    """An adapter around one module, or the whole model."""

    id: ClassVar[str] = "around"
    place: str = ""

    def attach(self, host: Any, name: str) -> None:
        module = host.model.get_submodule(self.place)
        host.wrap(name, module, Bent(host.site(module)))


@pytest.mark.parametrize(("place", "what"), [("lm_head", "the output is bent"), ("", "around which")])
def test_what_no_weight_says_is_refused(place: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"multiplies with the head's weight(.|\n)*{what}(.|\n)*Train with"):
        everywhere.trl(attached(Around(place=place)), tmp_path).train()


@pytest.mark.parametrize("bf16", [False, True])
def test_with_the_callback_alone_or_without_it(bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With autocast, accelerate stands around the forward pass that TRL wrote."""
    found = []
    for alone in (True, False):
        host = attached(al.LoRA(r=2, targets=["lm_head"]))
        with monkeypatch.context() as patch:
            patch.setattr(al, "hf_trainable", contextlib.nullcontext if alone else al.hf_trainable)
            trainer = everywhere.trl(host, tmp_path, bf16=bf16)
        if not alone:
            trainer.pop_callback(al.AdapterlabCallback)
        trainer.train()
        found.append(state_of(host))
    start = state_of(attached(al.LoRA(r=2, targets=["lm_head"])))
    assert apart(*found, start) < (0.1 if bf16 else 1e-9)  # the head's weight is rounded or not
    moved = [key for key in start if not torch.equal(found[0][key], start[key])]
    assert sorted(key.rpartition(".")[2] for key in moved) == ["A", "B"]
