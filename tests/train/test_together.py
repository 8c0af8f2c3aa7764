"""Runs in one pass against the same runs by themselves: gradients, weights, bits, failures, waiting."""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import adapterlab as al
from adapterlab.core.method import Method
from adapterlab.errors import DataError, TrainingError
from adapterlab.hosts import Host
from adapterlab.train import Ending, Entrant, Interrupted, Listener, Loop, Training, train_together
from adapterlab.train.sharing import LEAST, own_passes, same_bits
from adapterlab.train.together import admits

Rows = list[dict[str, list[int]]]


@dataclass
class Run:
    """What is trained, and what is seen of it."""

    method: Method
    training: Training
    rows: tuple[int, int | None] = (0, None)
    listeners: list[Listener] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def start(self, host: Host, name: str, rows: Rows) -> Loop:
        set_seed(self.training.seed)
        host.attach(self.method, name)
        loop = Loop(host, name, rows[slice(*self.rows)], self.training, eval_rows=rows[:4], listeners=self.listeners)
        step = loop.optimizer.step

        def spy() -> None:
            self.gradients.append({key: p.grad.clone() for key, p in host.named_parameters(name).items()})
            step()

        loop.optimizer.step = spy
        return loop

    def keep(self, host: Host, name: str) -> None:
        self.weights = host.state_dict(name)


def a(**settings: Any) -> Training:
    return Training(**{"steps": 4, "batch_size": 4, "lr": 1e-2, "warmup": 0, "eval_every": 3, **settings})


class Loads(Listener):
    """What the experts of a run are used."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def stepped(self, loop: Loop, record: dict[str, Any]) -> None:
        self.seen.append(record.get("load"))


MIX: dict[str, Callable[[], Run]] = {
    "lora": lambda: Run(al.LoRA(r=2, dropout=0.3, targets=["q", "v", "down"]), a(seed=1, steps=6)),
    "wide": lambda: Run(al.LoRA(r=5, targets="all-linear"), a(batch_size=2, accumulation=3, clip=None, lr=3e-3)),
    "dora": lambda: Run(al.DoRA(r=3, targets=["q", "up"]), a(schedule="linear", seed=2), (5, 16)),
    "ia3": lambda: Run(al.IA3(), a(batch_size=7, weight_decay=0.1, label_smoothing=0.1)),
    "prefix": lambda: Run(al.PrefixTuning(length=3), a(steps=2, clip=0.5)),
    "houlsby": lambda: Run(al.AdapterHoulsby(m=4), a(batch_size=1, steps=5, z_loss=1e-3, schedule="constant")),
    "router": lambda: Run(
        al.MoLA(r=2, experts="4", targets=["q"], balance=5.0), a(log_every=1, accumulation=2), listeners=[Loads()]
    ),
    "other": lambda: Run(al.MoLA(r=2, experts="3", targets=["q"], balance=0.0), a(log_every=2), listeners=[Loads()]),
    "head": lambda: Run(al.LoRA(r=2, targets=["q"], modules_to_save=["lm_head"]), a(steps=3)),
}


def by_itself(host: Host, run: Run, rows: Rows) -> Run:
    run.start(host, "default", rows).run()
    run.keep(host, "default")
    return run


def at_once(host: Host, runs: Mapping[str, Run], rows: Rows, **options: Any) -> dict[str, Ending]:
    def entrant(name: str, run: Run) -> Entrant:
        def leave() -> None:
            if name in host.methods:
                run.keep(host, name)
                host.detach(name)

        return Entrant(name, lambda stopping: run.start(host, name, rows).course(stopping), leave=leave)

    endings = train_together(host, [entrant(*item) for item in runs.items()], **options)
    assert [ending.name for ending in endings] == list(runs)
    return {ending.name: ending for ending in endings}


def check_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float, what: str) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        scale = max(float(value.abs().max()), 1e-3)
        off = float((found[key] - value).abs().max())
        assert off <= tolerance * scale, f"{what}, {key}: off by {off:.2g} at {scale:.2g}"


def check_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


def check_loads(found: Any, wanted: Any) -> None:
    assert any(wanted.seen)
    for load, other in zip(found.seen, wanted.seen, strict=True):
        assert (load or {}).keys() == (other or {}).keys()
        for path, shares in (other or {}).items():
            assert load[path] == pytest.approx(shares, abs=2e-4)


class Passes:
    """Counts the forward passes that are trained on, and their tokens."""

    def __init__(self, model: Any):
        self.tokens: list[int] = []
        model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self.tokens.append(kwargs["input_ids"].shape[1])


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
def test_runs_of_many_methods_are_what_they_are_by_themselves(
    recompute: str, tiny: Callable[..., Any], rows: Rows
) -> None:
    chosen = MIX if recompute == "none" else {name: MIX[name] for name in ("lora", "dora", "prefix")}

    def runs() -> dict[str, Run]:
        made = {name: make() for name, make in chosen.items()}
        for run in made.values():
            run.training = run.training.model_copy(update={"recompute": recompute})
        return made

    alone, shared = runs(), runs()
    for run in alone.values():
        by_itself(Host(tiny("llama")), run, rows)
    host = Host(tiny("llama"))
    before, passes = {k: v.clone() for k, v in host.model.state_dict().items()}, Passes(host.model)
    endings = at_once(host, shared, rows)
    for name, run in alone.items():
        ending, other = endings[name], shared[name]
        assert (ending.error, ending.why) == (None, ""), name
        assert ending.value.step == run.training.steps
        for step, (found, wanted) in enumerate(zip(other.gradients, run.gradients, strict=True)):
            check_close(found, wanted, 1e-5 if step == 0 else 1e-4, f"{name}, step {step + 1}")
        check_close(other.weights, run.weights, 1e-4, name)
        for mine, theirs in zip(other.listeners, run.listeners, strict=True):
            check_loads(mine, theirs)
    assert len(passes.tokens) == max(run.training.steps * run.training.accumulation for run in alone.values())
    assert host.methods == {}
    assert host.active == ()
    check_same(host.model.state_dict(), before)


def test_weights_after_twenty_steps_are_those_of_separate_runs(tiny: Callable[..., Any], rows: Rows) -> None:
    def runs() -> dict[str, Run]:
        made = {name: MIX[name]() for name in ("lora", "wide", "dora", "ia3", "prefix", "houlsby")}
        for run in made.values():
            run.training = run.training.model_copy(update={"steps": 20})
        return made

    alone, shared = runs(), runs()
    for run in alone.values():
        by_itself(Host(tiny("llama")), run, rows)
    endings = at_once(Host(tiny("llama")), shared, rows)
    for name, run in alone.items():
        assert endings[name].value.step == 20
        check_close(shared[name].gradients[0], run.gradients[0], 1e-5, f"{name}, first step")
        check_close(shared[name].weights, run.weights, 1e-4, name)


def test_exact_passes_give_the_bits_of_separate_runs(tiny: Callable[..., Any], rows: Rows) -> None:
    alone, exact = ({name: make() for name, make in MIX.items()} for _ in range(2))
    for run in alone.values():
        by_itself(Host(tiny("llama")), run, rows)
    endings = at_once(Host(tiny("llama")), exact, rows, exact=True)
    for name, run in alone.items():
        assert "asked for" in endings[name].why
        check_same(exact[name].weights, run.weights)


def test_shared_passes_give_the_bits_of_separate_runs_where_the_probe_says_so(tiny: Callable[..., Any]) -> None:
    """Over steps in which each micro-batch has as many tokens as the probe asks for."""
    if not same_bits(tiny("llama")):
        pytest.skip("a row of a product depends on the rows beside it with this processor and its library")
    draw = random.Random(0)
    lengths = [draw.randrange(LEAST, LEAST + 20) for _ in range(24)]
    long = [{"input_ids": ids, "labels": ids} for ids in ([draw.randrange(3, 128) for _ in range(n)] for n in lengths)]

    def runs() -> dict[str, Run]:
        return {
            "narrow": Run(al.LoRA(r=2, dropout=0.3, targets=["q", "v", "down"]), a(steps=6, batch_size=2, seed=1)),
            "wide": Run(al.LoRA(r=5, targets="all-linear"), a(steps=5, batch_size=1, accumulation=3, clip=None)),
            "scaled": Run(al.LoRA(r=3, alpha=32.0, scale="sqrt", targets=["k", "up"]), a(steps=6, lr=3e-3), (3, 20)),
        }

    alone, shared = runs(), runs()
    for run in alone.values():
        by_itself(Host(tiny("llama")), run, long)
    endings = at_once(Host(tiny("llama")), shared, long)
    for name, run in alone.items():
        assert (endings[name].error, endings[name].why) == (None, ""), name
        for found, wanted in zip(shared[name].gradients, run.gradients, strict=True):
            check_same(found, wanted)
        check_same(shared[name].weights, run.weights)


class Spoils(Listener):
    """Puts a number that is none into the adapter after a step."""

    def stepped(self, loop: Loop, record: dict[str, Any]) -> None:
        if record["step"] == 2:
            loop.parameters()[0].data.view(-1)[0] = math.nan


class Fails(Listener):
    def evaluated(self, loop: Loop, record: dict[str, Any], improved: bool) -> None:
        raise ZeroDivisionError("evaluation")


@pytest.mark.parametrize(("bad", "error"), [(Spoils, TrainingError), (Fails, ZeroDivisionError)])
def test_a_run_that_fails_leaves_the_others_untouched_to_the_bit(
    bad: type[Listener], error: type[Exception], tiny: Callable[..., Any], rows: Rows
) -> None:
    def runs(*listeners: Listener) -> dict[str, Run]:
        # The third step of the one in the middle is its last, whether it fails there or not.
        names = ("lora", "wide", "houlsby")
        middle = Run(al.LoRA(r=4, targets="all-linear"), a(steps=3), listeners=list(listeners))
        return {"first": MIX[names[0]](), "middle": middle, "third": MIX[names[1]](), "last": MIX[names[2]]()}

    sound, failing = runs(), runs(bad())
    at_once(Host(tiny("llama")), sound, rows)
    endings = at_once(Host(tiny("llama")), failing, rows)
    assert isinstance(endings["middle"].error, error)
    assert endings["middle"].value is None
    for name in ("first", "third", "last"):
        assert endings[name].error is None
        check_same(failing[name].weights, sound[name].weights)


def test_a_run_that_cannot_begin_ends_alone(tiny: Callable[..., Any], rows: Rows) -> None:
    runs = {"empty": Run(al.LoRA(r=2), a(), (0, 0)), "sound": MIX["dora"]()}
    endings = at_once(Host(tiny("llama")), runs, rows)
    assert isinstance(endings["empty"].error, DataError)
    assert endings["sound"].value.step == 4


class Own(al.LoRA):
    """Computes gradients by itself."""

    id: ClassVar[str] = "own_gradients"

    def gradient(self, host: Host, name: str, loss: Any, backward: Any) -> Tensor:
        value: Tensor = loss()
        backward(value)
        return value.detach()


ALONE: dict[str, tuple[Callable[[], Run], str]] = {
    "own": (lambda: Run(Own(r=2, targets=["q"]), a()), "computes gradients in its own way"),
    "padded": (lambda: Run(al.LoRA(r=2, targets=["q"]), a(packing=False)), "rows are padded, as asked for"),
    "prompt": (lambda: Run(al.PromptTuning(length=2), a()), "may mix positions"),
}


def test_runs_with_passes_of_their_own_say_why_and_are_to_the_bit_what_they_are_alone(
    tiny: Callable[..., Any], rows: Rows
) -> None:
    chosen = {name: make for name, (make, _) in ALONE.items()} | {name: MIX[name] for name in ("lora", "ia3")}
    runs = {name: make() for name, make in chosen.items()}
    told: dict[str, str] = {}
    endings = at_once(Host(tiny("llama")), runs, rows, tell=lambda loop, why: told.update({loop.name: why}))
    assert [name for name in runs if not endings[name].why] == ["lora", "ia3"]
    for name, (make, why) in ALONE.items():
        assert why in endings[name].why == told[name]
        check_same(runs[name].weights, by_itself(Host(tiny("llama")), make(), rows).weights)


class Draws(al.LoRA):
    """Takes random numbers of every kind before its steps."""

    id: ClassVar[str] = "draws"
    seen: ClassVar[dict[str, list[tuple[float, ...]]]] = {}

    def before_step(self, host: Host, name: str, step: int, optimizer: Any) -> None:
        drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
        self.seen.setdefault(name, []).append(drawn)


def test_random_numbers_outside_of_passes_are_each_runs_own(tiny: Callable[..., Any], rows: Rows) -> None:
    def made(seed: int) -> Run:
        return Run(Draws(r=2, dropout=0.5, targets=["q"]), a(seed=seed))

    Draws.seen.clear()
    runs = {"one": made(1), "two": made(2)}
    at_once(Host(tiny("llama")), runs, rows)
    together = dict(Draws.seen)
    for name, seed in (("one", 1), ("two", 2)):
        by_itself(Host(tiny("llama")), made(seed), rows)
        assert together[name] == Draws.seen.pop("default")


def test_a_model_with_dropout_of_its_own_has_one_pass_for_each_run(rows: Rows) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
    for dropout in (0.1, 0.0):
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        host = Host(GPT2LMHeadModel(GPT2Config(**shape, **rates, eos_token_id=2)))
        loop = Run(al.LoRA(r=2), a()).start(host, "one", rows)
        before = torch.get_rng_state()
        why = own_passes(loop)
        assert ("dropout of its own" in why) == bool(dropout), why
        assert torch.equal(torch.get_rng_state(), before)


def test_a_shared_pass_that_fails_is_computed_one_by_one(tiny: Callable[..., Any], rows: Rows) -> None:
    """Dropout goes on as if nothing had happened."""
    host, runs = Host(tiny("llama")), {name: MIX[name]() for name in ("lora", "ia3")}
    longest = 0

    def full(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal longest
        if torch.is_grad_enabled() and kwargs["input_ids"].shape[1] > longest:
            longest = kwargs["input_ids"].shape[1]
            if host.state.segments is not None:
                raise RuntimeError("out of memory")

    host.model.base_model.register_forward_pre_hook(full, with_kwargs=True)
    endings = at_once(host, runs, rows)
    for name in runs:
        assert "out of memory" in endings[name].why
        check_same(runs[name].weights, by_itself(Host(tiny("llama")), MIX[name](), rows).weights)


def test_a_shared_pass_that_fails_on_its_way_back_leaves_earlier_gradients(
    tiny: Callable[..., Any], rows: Rows
) -> None:
    """In the middle of a step of several micro-batches, when some gradients have arrived already."""
    host, runs = Host(tiny("llama")), {name: MIX[name]() for name in ("wide", "ia3")}
    passes = 0

    def failing(gradient: Tensor) -> None:
        raise RuntimeError("out of memory")

    def second(module: Any, args: Any, out: Any) -> None:
        nonlocal passes
        if torch.is_grad_enabled() and host.state.segments is not None:
            passes += 1
            if passes == 2:
                out.register_hook(failing)

    host.model.model.layers[0].mlp.register_forward_hook(second)
    endings = at_once(host, runs, rows)
    assert passes == 2
    for name in runs:
        assert endings[name].error is None
        assert "out of memory" in endings[name].why
        check_close(runs[name].weights, by_itself(Host(tiny("llama")), MIX[name](), rows).weights, 1e-3, name)


def test_who_has_no_room_waits_until_others_have_left(tiny: Callable[..., Any], rows: Rows) -> None:
    host, log = Host(tiny("llama")), list[str]()

    def entrant(name: str, need: int | None) -> Entrant:
        run = Run(al.LoRA(r=2, targets=["q"]), a(steps=2))

        def start(stopping: Any) -> Any:
            log.append(f"+{name}")
            return run.start(host, name, rows).course(stopping)

        def leave() -> None:
            log.append(f"-{name}")
            host.detach(name)

        return Entrant(name, start, need, leave)

    needs = {"a": 6, "b": 3, "c": 5, "d": None, "e": 20}
    endings = train_together(host, [entrant(*item) for item in needs.items()], room=10)
    assert [ending.error for ending in endings] == [None] * 5
    assert log == ["+a", "+b", "-a", "-b", "+c", "-c", "+d", "-d", "+e", "-e"]
    assert admits(5, [None], None)
    assert not admits(5, [None], 100)
    assert not admits(None, [1], 100)
    assert admits(1000, [], 1)


def test_a_signal_ends_all_after_their_step(tiny: Callable[..., Any], rows: Rows) -> None:
    class Stops(Listener):
        def stepped(self, loop: Loop, record: dict[str, Any]) -> None:
            if record["step"] == 2:
                os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    host = Host(tiny("llama"))
    runs = {"slow": MIX["wide"](), "stops": Run(al.LoRA(r=2, targets=["q"]), a(), listeners=[Stops()])}
    entrants = [
        Entrant(name, lambda stopping, name=name, run=run: run.start(host, name, rows).course(stopping), 5)
        for name, run in [*runs.items(), ("waits", MIX["lora"]())]
    ]
    endings = train_together(host, entrants, room=10)
    assert [type(ending.error) for ending in endings] == [Interrupted] * 3
    assert [ending.error.step for ending in endings] == [1, 2, 0]  # type: ignore[union-attr]
    assert signal.getsignal(signal.SIGINT) is handler


def test_bits_of_products_are_tried(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterlab.train import sharing

    model, plain = tiny("llama"), torch.nn.functional.linear

    def careless(x: Tensor, weight: Tensor) -> Tensor:
        return plain(x, weight) * (1 + 1e-6 * (len(x) > 100))

    assert isinstance(same_bits(model), bool)
    monkeypatch.setattr(sharing.F, "linear", careless)
    assert not same_bits(model)
