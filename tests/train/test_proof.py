"""What does not train is found, and what does passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from adapterlab.errors import NotTrainingError
from adapterlab.hosts import Host, attach
from adapterlab.methods.in_place.full import Full
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.train import Loop, Training, proof, train

Rows = list[dict[str, list[int]]]


class Broken(LoRA):
    """LoRA whose output does not arrive."""

    id: ClassVar[str] = "broken"
    how: str = "zero"

    class Layer(LoRA.Layer):
        def __init__(self, method: Any, site: Any):
            super().__init__(method, site)
            self.how = method.how if site.layer == 0 else "fine"

        def around(self, run: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y: Tensor = run(x)
            extra = self(x)
            return y + {"zero": extra * 0, "detached": extra.detach(), "fine": extra}[self.how]


@pytest.mark.parametrize(("how", "reason"), [("zero", "gradient zero"), ("detached", "no gradient")])
def test_an_adapter_that_does_not_reach_the_loss_is_named(
    tiny: Callable[..., Any], rows: Rows, how: str, reason: str
) -> None:
    host = attach(tiny("llama"), Broken(r=2, targets=["q"], how=how))
    with pytest.raises(NotTrainingError) as caught:
        train(host, "default", rows, Training(steps=10, batch_size=4))
    text = str(caught.value)
    assert "2 of 4 trainable tensors did not train within 3 steps" in text
    assert f"adapter.model.layers.0.self_attn.q_proj.A: {reason}" in text
    assert "layers.1" not in text
    assert "training.proof_steps" in text


def test_a_module_that_is_passed_by_is_named(tiny: Callable[..., Any], rows: Rows) -> None:
    host = attach(tiny("llama"), LoRA(r=2, targets=["q", "v"]))
    module = host.model.model.layers[1].self_attn.v_proj
    module.forward = lambda x: nn.functional.linear(x, module.weight)  # code that reads the weight itself
    with pytest.raises(NotTrainingError, match=r"layers\.1\.self_attn\.v_proj\.A: no gradient"):
        train(host, "default", rows, Training(steps=10, batch_size=4))


def test_a_run_that_is_too_short_still_fails_if_nothing_trains(tiny: Callable[..., Any], rows: Rows) -> None:
    class AllBroken(Broken):
        id: ClassVar[str] = "all_broken"

        class Layer(Broken.Layer):
            def __init__(self, method: Any, site: Any):
                super().__init__(method, site)
                self.how = "detached"

    host = attach(tiny("llama"), AllBroken(r=2, targets=["q"]))
    # Something must require a gradient for the backward pass to run at all.
    with pytest.raises((NotTrainingError, RuntimeError)):
        train(host, "default", rows, Training(steps=1, batch_size=4))
    with pytest.raises(NotTrainingError, match="4 of 4"):
        train(attach(tiny("llama"), LoRA(r=2, targets=["q"])), "default", rows, Training(steps=1, batch_size=4, lr=0))


def test_a_learning_rate_of_zero_is_not_training(tiny: Callable[..., Any], rows: Rows) -> None:
    host = attach(tiny("llama"), LoRA(r=2, targets=["q"]))
    with pytest.raises(NotTrainingError, match=r"did not change the values(.|\n)*learning rate of the last step was 0"):
        train(host, "default", rows, Training(steps=10, batch_size=4, lr=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [LoRA(r=2, targets="all-linear"), Full()], ids=["lora", "full"])
def test_healthy_methods_pass(tiny: Callable[..., Any], rows: Rows, dtype: torch.dtype, method: Any) -> None:
    """A of LoRA has a gradient of zero in the first step; full tuning in bf16 moves masters, and few embedding rows."""
    loop = Loop(attach(tiny("llama").to(dtype), method), "default", rows, Training(steps=4, batch_size=4, lr=1e-6))
    loop.run()
    assert loop.proof.proven == set(loop.host.named_parameters("default"))
    assert not loop.proof.open


class Alternating(LoRA):
    """Trains one tensor a step, chosen by the step: what is frozen at the moment owes nothing."""

    id: ClassVar[str] = "alternating"

    def before_step(self, host: Host, name: str, step: int, optimizer: Any) -> None:
        tensors = [t for t in host.tensors(name).values() if isinstance(t, nn.Parameter)]
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i == (2 * step + 1) % len(tensors))


def test_what_is_frozen_at_the_moment_owes_nothing(tiny: Callable[..., Any], rows: Rows) -> None:
    host = attach(tiny("llama"), Alternating(r=2, targets=["q", "v"]))
    loop = Loop(host, "default", rows, Training(steps=9, batch_size=4))
    loop.run()
    assert loop.proof.proven
    assert all(key.endswith(".B") for key in loop.proof.proven)


class Fused(LoRA):
    """Updates during the backward pass and leaves no gradient behind."""

    id: ClassVar[str] = "fused"

    def optimizer(self, host: Host, name: str, make: Any) -> Any:
        def update(p: nn.Parameter) -> None:
            with torch.no_grad():
                p.sub_(0.1 * p.grad)
            p.grad = None

        for p in host.parameters(name):
            p.register_post_accumulate_grad_hook(update)
        return make(host.parameters(name))


def test_updates_inside_the_backward_pass_count(tiny: Callable[..., Any], rows: Rows) -> None:
    loop = Loop(attach(tiny("llama"), Fused(r=2, targets=["q"])), "default", rows, Training(steps=4, batch_size=4))
    loop.run()
    assert len(loop.proof.proven) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opposite_steps_are_seen(dtype: torch.dtype) -> None:
    """Two values of one exponent that move by the same step, up and down, leave the sum of their bits as it was."""
    before = torch.tensor([0.5, 0.75], dtype=dtype)
    assert proof._fingerprint(before) != proof._fingerprint(before + torch.tensor([0.03125, -0.03125], dtype=dtype))
    assert proof._fingerprint(before) == proof._fingerprint(before.clone())
