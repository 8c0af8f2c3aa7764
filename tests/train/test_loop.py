"""The loop against references: accumulation, clipping, events, order, evaluation, early stopping."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from accelerate.state import GradientState
from torch import Tensor

from adapterlab.core.method import Method
from adapterlab.data import Collator
from adapterlab.errors import ConfigError, DataError, TrainingError
from adapterlab.hosts import Host, attach
from adapterlab.methods.in_place.full import Full
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.train import Listener, Loop, Training, train
from adapterlab.train.sampler import Sampler, order

Rows = list[dict[str, list[int]]]


class Recorder(Listener):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.evaluations: list[tuple[float, bool]] = []
        self.adapters: list[dict[str, Tensor]] = []

    def stepped(self, loop: Loop, record: dict[str, Any]) -> None:
        self.records.append(record)

    def evaluated(self, loop: Loop, record: dict[str, Any], improved: bool) -> None:
        self.evaluations.append((record["eval_loss"], improved))
        self.adapters.append(loop.host.state_dict(loop.name))


def lora_host(tiny: Callable[..., Any], kind: str = "llama", seed: int = 3) -> Host:
    model = tiny(kind)  # may set the seed itself
    torch.manual_seed(seed)
    host = attach(model, LoRA(r=2, targets=["q", "v"]))
    with torch.no_grad():
        for p in host.parameters("default"):
            p.add_(torch.randn_like(p) * 0.1)
    return host


def one_step(host: Host, rows: Rows, **training: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gradients of the first step, seen just before the update, and its record."""
    loop = Loop(host, "default", rows, Training(steps=1, warmup=0, proof_steps=0, **training))
    seen: dict[str, Tensor] = {}
    step = loop.optimizer.step

    def spy() -> None:
        seen.update({k: p.grad.clone() for k, p in host.named_parameters("default").items()})
        step()

    loop.optimizer.step = spy
    return seen, loop.step()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_accumulation_equals_one_big_batch_and_the_models_own_loss(
    tiny: Callable[..., Any], rows: Rows, kind: str
) -> None:
    """Rows of different lengths: a mean of means would be wrong."""
    whole, record = one_step(lora_host(tiny, kind), rows, batch_size=12, clip=None)
    parts, record_parts = one_step(lora_host(tiny, kind), rows, batch_size=4, accumulation=3, clip=None)
    host = lora_host(tiny, kind)
    chosen = [rows[i] for i in order([len(r["input_ids"]) for r in rows], seed=0, epoch=0)[:12]]
    host.model.train()
    loss = host.model(**Collator(0)(chosen)).loss
    loss.backward()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record_parts["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for key, p in host.named_parameters("default").items():
        rounding = 1e-6 * float(p.grad.abs().max())
        torch.testing.assert_close(whole[key], p.grad, rtol=1e-4, atol=rounding)
        torch.testing.assert_close(parts[key], p.grad, rtol=1e-4, atol=rounding)


def test_clipping_is_of_the_norm_of_all_gradients(tiny: Callable[..., Any], rows: Rows) -> None:
    free, record = one_step(lora_host(tiny), rows, batch_size=8, clip=None)
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in free.values()))
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
    clipped, record = one_step(lora_host(tiny), rows, batch_size=8, clip=norm / 4)
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for key in free:
        torch.testing.assert_close(clipped[key], free[key] / 4, rtol=1e-4, atol=1e-8)


def test_order_of_rows() -> None:
    sampler = Sampler([1] * 10, seed=1, batch_size=2, batches=2, limit=25)
    steps = [sampler.step(i) for i in range(7)]
    assert [[len(b) for b in step] for step in steps] == [[2, 2]] * 6 + [[1]]
    flat = [row for step in steps for batch in step for row in batch]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10))
    assert flat[:10] != flat[10:20], "epochs are shuffled anew"
    assert Sampler([1] * 10, seed=1, batch_size=2, batches=2, limit=25).step(5) == steps[5], "depends on the step alone"
    assert Sampler([1] * 10, seed=2, batch_size=2, batches=2, limit=25).step(0) != steps[0]
    assert [sampler.epoch(s) for s in (0, 5, 7)] == [0, 2, 2.5]
    few = Sampler([1] * 3, seed=0, batch_size=8, batches=1).step(0)[0]
    assert sorted(few[:3]) == sorted(few[3:6]) == [0, 1, 2], "a step may hold several epochs"
    assert len(few) == 8


class Eventful(LoRA):
    """Writes down what is called, and checks what must hold then."""

    id: ClassVar[str] = "eventful"
    log: ClassVar[list[tuple[Any, ...]]] = []

    def prepare(self, host: Host, name: str, batches: Any) -> None:
        count = sum(1 for _ in batches)
        assert count == sum(1 for _ in batches), "the batches can be gone through again"
        self.log.append(("prepare", count))

    def optimizer(self, host: Host, name: str, make: Any) -> Any:
        self.log.append(("optimizer",))
        return super().optimizer(host, name, make)

    def gradient(self, host: Host, name: str, loss: Any, backward: Any) -> Tensor:
        self.log.append(("gradient",))
        return super().gradient(host, name, loss, backward)

    def before_step(self, host: Host, name: str, step: int, optimizer: Any) -> None:
        assert all(p.grad is None for p in host.parameters(name))
        self.log.append(("before_step", step))

    def after_backward(self, host: Host, name: str, step: int) -> None:
        assert all(p.grad is not None for p in host.parameters(name))
        self.log.append(("after_backward", step))

    def after_step(self, host: Host, name: str, step: int, optimizer: Any) -> None:
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert all(p.grad is not None for p in host.parameters(name))
        self.log.append(("after_step", step))

    def finish(self, host: Host, name: str) -> None:
        self.log.append(("finish",))


def test_events_come_in_their_order(tiny: Callable[..., Any], rows: Rows) -> None:
    Eventful.log.clear()
    host = attach(tiny("llama"), Eventful(r=2, targets=["q"]))
    train(host, "default", rows, Training(steps=2, batch_size=4, accumulation=2))
    step = ["before_step", "gradient", "gradient", "after_backward", "after_step"]
    assert [entry[0] for entry in Eventful.log] == ["prepare", "optimizer", *step, *step, "finish"]
    assert Eventful.log[0] == ("prepare", 6)
    assert [entry[1] for entry in Eventful.log if entry[0] == "before_step"] == [0, 1]


class Noisy(LoRA):
    """Emits a loss in each forward pass, and has a penalty."""

    id: ClassVar[str] = "noisy"

    def penalty(self, host: Host, name: str) -> Tensor:
        return torch.stack([p.sum() for p in host.parameters(name)]).sum()


def test_losses_of_adapters_and_penalties_count_once_a_step(tiny: Callable[..., Any], rows: Rows) -> None:
    def run(method: Method, **training: Any) -> tuple[dict[str, Tensor], float]:
        model = tiny("llama")
        torch.manual_seed(0)
        host = attach(model, method)
        if isinstance(method, Noisy):
            part = next(iter(host.adapters("default").values()))
            layer = host.layers[0]
            layer.register_forward_hook(lambda *_: host.state.emit(2.0 * part.A.sum()))
        seen, record = one_step(host, rows, clip=None, **training)
        return seen, record["loss"]

    plain, loss = run(LoRA(r=2, targets=["q"]), batch_size=12)
    for training in ({"batch_size": 12}, {"batch_size": 4, "accumulation": 3}):
        noisy, more = run(Noisy(r=2, targets=["q"]), **training)
        keys = list(plain)
        extra = {key: noisy[key] - plain[key] for key in keys}
        first_a = next(key for key in keys if key.endswith(".A"))
        for key in keys:
            expected = 3.0 if key == first_a else 1.0
            torch.testing.assert_close(extra[key], torch.full_like(extra[key], expected), rtol=1e-4, atol=1e-5)
        assert more != pytest.approx(loss)


def test_evaluation_is_the_mean_over_tokens(tiny: Callable[..., Any], rows: Rows) -> None:
    host = lora_host(tiny)
    recorder = Recorder()
    train(
        host, "default", rows, Training(steps=3, batch_size=4, eval_every=2, eval_batch_size=5),
        eval_rows=rows[:11], listeners=[recorder],
    )  # fmt: skip
    assert len(recorder.evaluations) == 2, "after step 2 and at the end"
    total = tokens = 0.0
    with torch.no_grad():
        for row in rows[:11]:
            batch = Collator(0)([row])
            count = sum(label != -100 for label in row["labels"][1:])
            total += float(host.model(**batch).loss) * count
            tokens += count
    assert recorder.evaluations[-1][0] == pytest.approx(total / tokens, rel=1e-5)


def test_early_stopping_and_the_best_adapter(tiny: Callable[..., Any], rows: Rows) -> None:
    """Rows to evaluate on that contradict the training rows: the loss falls, then only rises."""
    recorder = Recorder()
    host = lora_host(tiny)
    status = train(
        host, "default", rows[:4], Training(steps=60, batch_size=4, lr=0.05, eval_every=1, patience=3, warmup=0),
        eval_rows=rows[4:], listeners=[recorder],
    )  # fmt: skip
    losses = [loss for loss, _ in recorder.evaluations]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert status.step == len(losses) < 60
    assert best == len(losses) - 4, "stopped after exactly three without a new lowest loss"
    assert (status.best_loss, status.best_step) == (losses[best], best + 1)
    assert [improved for _, improved in recorder.evaluations][best:] == [True, False, False, False]


def test_training_is_reproducible_and_depends_on_the_seed(tiny: Callable[..., Any], rows: Rows) -> None:
    def run(seed: int) -> list[float]:
        recorder = Recorder()
        model = tiny("llama")
        torch.manual_seed(1)
        host = attach(model, LoRA(r=2, dropout=0.3, targets=["q", "v"]))
        torch.rand(seed + 5)  # whatever random numbers were drawn before must not matter
        train(host, "default", rows, Training(steps=4, batch_size=4, lr=1e-2, seed=seed), listeners=[recorder])
        return [record["loss"] for record in recorder.records]

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_a_state_continues_to_the_bit_with_masters(tiny: Callable[..., Any], rows: Rows) -> None:
    """Full tuning in bfloat16: masters and moments are part of the state."""
    training = Training(steps=6, batch_size=4, lr=1e-4)

    def loop() -> Loop:
        return Loop(attach(tiny("llama").bfloat16(), Full()), "default", rows, training)

    straight, first = loop(), loop()
    straight.run()
    for _ in range(3):
        first.step()
    second = loop()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.run()
    expected = straight.host.state_dict("default")
    assert all(torch.equal(value, expected[key]) for key, value in second.host.state_dict("default").items())
    state = first.state_dict()
    with pytest.raises(TrainingError, match="in another order or number"):
        loop().load_state_dict({**state, "optimized": state["optimized"][::-1]})


def test_a_trainer_that_stopped_between_two_batches_does_not_stop_us(tiny: Callable[..., Any], rows: Rows) -> None:
    GradientState().sync_gradients = False
    host = lora_host(tiny)
    before = host.state_dict("default")
    train(host, "default", rows, Training(steps=1, batch_size=4))
    assert any(not torch.equal(value, before[key]) for key, value in host.state_dict("default").items())


def test_a_loss_that_is_not_finite_stops_with_step_and_causes(tiny: Callable[..., Any], rows: Rows) -> None:
    host = lora_host(tiny)
    before = host.state_dict("default")
    with torch.no_grad():
        host.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"loss is nan at step 1 .*training\.lr"):
        train(host, "default", rows, Training(steps=3, batch_size=4))
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict("default").items())


def test_wrong_use_is_refused(tiny: Callable[..., Any], rows: Rows) -> None:
    host = lora_host(tiny)
    with pytest.raises(DataError, match="no rows"):
        train(host, "default", [])
    with pytest.raises(DataError, match="Step 1 has no token with a label"):
        train(host, "default", [{"input_ids": [3, 4], "labels": [3, -100]}], Training(steps=1))
    host.activate()
    with pytest.raises(ConfigError, match=r"host\.activate\('default'\)"):
        train(host, "default", rows)


@pytest.mark.parametrize("mode", ["cheap", "full"])
def test_recomputation_gives_the_same_gradients(mode: str, tiny: Callable[..., Any], rows: Rows) -> None:
    plain, _ = one_step(lora_host(tiny), rows, batch_size=8)
    recomputed, _ = one_step(lora_host(tiny), rows, batch_size=8, recompute=mode)
    for key in plain:
        torch.testing.assert_close(plain[key], recomputed[key])
