"""The engine on a tiny model: every answer is the one that its adapter gives alone, whatever else is computed."""

from __future__ import annotations

import errno
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from served import METHODS, ask, filled, tiny_llama

import adapterlab as al
from adapterlab.engine.products import fastest
from adapterlab.errors import BusyError, ConfigError, FormatError, ModelError, UnknownAdapterError, UnusableAdapterError
from adapterlab.foreign import compiler
from adapterlab.ops import by_address
from adapterlab.serve import Engine, EngineSettings, Finished, Request, Sampling, Token, worker

PROMPTS = [(5, 9, 31), (5, 9, 31, 7, 7, 12, 90, 4, 11), tuple(range(20, 41)), (3,)]


def settled(engine: Engine) -> None:
    """Nothing is left of the requests: no page, and no reference to an adapter."""
    assert engine.drain(60)
    seen = engine.statistics()
    assert (seen.running, seen.waiting) == (0, 0)
    assert all(one.running == one.waiting == 0 for one in engine.adapters(every=True))
    worker = engine._worker
    assert seen.pages_used == sum(version.room for version in worker.adapters.loaded)
    engine.stop()
    assert (worker.pages.held, worker.pages.paid) == (0, 0)
    assert al.host(engine.model) is None


def test_all_kinds_in_one_batch_answer_as_they_do_alone(alone: Any, engine: Any) -> None:
    one = engine(max_running=40, step_tokens=64)
    asked = [(name, prompt) for name in (None, *METHODS) for prompt in PROMPTS]
    random.Random(0).shuffle(asked)
    handles = [one.submit(ask(prompt, name)) for name, prompt in asked]
    for handle, (name, prompt) in zip(handles, asked, strict=True):
        assert handle.result(60)[0].ids == alone.answer(name, prompt), name
    assert len({tuple(alone.answer(name, PROMPTS[1])) for name in (None, *METHODS)}) > len(METHODS) - 2, "they differ"
    forms = {state.name: state.form for state in one.adapters()}
    assert forms == {**dict.fromkeys(METHODS, "tokens"), "before": "pages", "words": "pages", "norms": "alone"}
    settled(one)


def test_updates_are_computed_by_a_kernel_or_in_torch(alone: Any, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    way, _ = fastest("cpu")
    if way is not None:
        step = by_address._Step.__call__
        monkeypatch.setattr(by_address._Step, "__call__", lambda *args: (computed.append(args[1]), step(*args))[1])
    without = "torch (there is no compiler)"
    monkeypatch.setattr(
        worker, "fastest", lambda kind: (way, "") if way is not None else (None, "there is no compiler")
    )
    for products, said in (("auto", without if way is None else way.name), ("torch", "torch (as settings say)")):
        computed.clear()
        one = engine("low", "low2", "low3", "moved", "scaled", products=products)
        asked = [(name, prompt) for name in ("low", "low2", None, "low3", "moved", "scaled") for prompt in PROMPTS]
        handles = [one.submit(ask(prompt, name)) for name, prompt in asked]
        for handle, (name, prompt) in zip(handles, asked, strict=True):
            assert handle.result(60)[0].ids == alone.answer(name, prompt), name
        assert one.products == said
        assert bool(computed) == (way is not None and products == "auto")
        settled(one)
    monkeypatch.setattr(worker, "fastest", lambda kind: (None, "there is no compiler"))
    assert engine("low").products == without


def test_without_room_for_a_kernel_torch_computes_and_says_why(
    alone: Any, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if fastest("cpu")[0] is None:
        pytest.skip("there is no compiler")
    monkeypatch.setenv("ADAPTERLAB_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "tempfile", SimpleNamespace(TemporaryDirectory=full))
    monkeypatch.setattr(worker, "fastest", fastest.__wrapped__)
    one = engine("low", "low3")
    handles = [(name, one.submit(ask(PROMPTS[1], name))) for name in ("low", None, "low3")]
    for name, handle in handles:
        assert handle.result(60)[0].ids == alone.answer(name, PROMPTS[1]), name
    assert one.products.startswith("torch (")
    assert "No space left on device" in one.products


@pytest.mark.parametrize("seed", range(3))
def test_random_traces_with_evictions_and_reloads(seed: int, alone: Any, merged: Any, engine: Any) -> None:
    """Little memory, so that answers give way and adapters go and come back; shared beginnings; some are cancelled.

    Answers are those of the adapter on the model, and of a model that it was merged into.
    """
    draw, compared = random.Random(seed), set[str]()
    one = engine(memory_gb=45e-6, max_running=5, step_tokens=16, max_adapters=3, patience=0.05)
    asked = []
    for _ in range(24):
        name, tenant = draw.choice([None, *METHODS]), draw.choice(["x", "y"])
        beginning = PROMPTS[1][: draw.choice([4, 8])]
        prompt = (*beginning, *draw.choices(range(3, 100), k=draw.randrange(1, 6)))
        handle = one.submit(ask(prompt, name, tenant))
        if draw.random() < 0.15:
            handle.cancel()
        elif draw.random() < 0.2 and name is not None:
            one.register(name, alone.root / name)
        asked.append((handle, name, prompt))
        time.sleep(draw.random() * 0.01)
    for handle, name, prompt in asked:
        answer = handle.result(60)[0]
        assert answer.end is not None
        wanted = alone.answer(name, prompt)
        assert answer.ids == wanted[: len(answer.ids)]
        assert len(answer.ids) == len(wanted) or handle.cancelled
        if name in merged:
            assert answer.ids == merged.answer(name, prompt)[: len(answer.ids)], name
            compared.add(name)
    seen = one.statistics()
    assert seen.unloads
    assert len(compared) > 2
    settled(one)


def test_a_name_that_is_registered_again_answers_anew_and_cached_prefixes_do_not(
    alone: Any, engine: Any, tmp_path: Path
) -> None:
    one = engine("low")
    prompt = PROMPTS[2]
    running = one.submit(ask(prompt, "low", max_tokens=20))
    assert one.submit(ask(prompt, "low")).result(60)[0].ids == alone.answer("low", prompt)
    assert one.register("low", alone.root / "low3").version == 2
    assert one.submit(ask(prompt, "low")).result(60)[0].ids == alone.answer("low3", prompt)
    assert running.result(60)[0].ids == alone.answer("low", prompt, 20)
    cached = one.submit(ask(prompt, "low")).result(60)[0]
    assert cached.ids == alone.answer("low3", prompt)
    assert cached.end.cached_tokens == 20
    one.unregister("low")
    with pytest.raises(UnknownAdapterError, match="'low' is registered"):
        one.submit(ask(prompt, "low"))
    settled(one)


def test_what_is_unregistered_while_it_runs_is_computed_to_its_end(alone: Any, engine: Any) -> None:
    one, prompt = engine("low"), PROMPTS[0]
    running = one.submit(ask(prompt, "low", max_tokens=50, ignore_end=True))
    first = running.next_event(60)
    assert isinstance(first, Token)
    one.unregister("low")
    with pytest.raises(UnknownAdapterError):
        one.submit(ask(prompt, "low"))
    (rest,) = running.result(60)
    wanted = alone.answer("low", prompt, 50)
    assert [first.id, *rest.ids][: len(wanted)] == wanted
    assert len(rest.ids) == 49
    assert one.drain(60)
    assert one.statistics().adapters_loaded == 0
    settled(one)


def test_a_broken_adapter_harms_nobody_else(alone: Any, engine: Any, tmp_path: Path) -> None:
    """One whose numbers overflow when it is used, one that was damaged after it was registered, and no adapter."""
    one = engine("low", "low3")
    assert one.warm("low").form  # the first of its kind is tried; the next one shows what it is in a step
    alone.save("wild", METHODS["low"](), 1, size=1e30)
    one.register("wild", alone.root / "wild")
    damaged = alone.save("damaged", METHODS["low"](), 2)
    one.register("damaged", damaged)
    file = damaged / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(FormatError):
        one.register("nothing", tmp_path)
    others = [(name, prompt) for prompt in PROMPTS for name in ("low", None, "low3")]
    handles = [one.submit(ask(prompt, name)) for name, prompt in others]
    for name, what in (("wild", "not finite"), ("damaged", "not the file that was saved")):
        with pytest.raises(UnusableAdapterError, match=what):
            one.submit(ask(PROMPTS[0], name)).result(60)
        assert one.adapter(name).state == "quarantined"
        with pytest.raises(UnusableAdapterError, match=what):
            one.submit(ask(PROMPTS[0], name))
    for handle, (name, prompt) in zip(handles, others, strict=True):
        assert handle.result(60)[0].ids == alone.answer(name, prompt)
    one.register("wild", alone.root / "low")
    assert one.submit(ask(PROMPTS[0], "wild")).result(60)[0].ids == alone.answer("low", PROMPTS[0])
    settled(one)


def test_a_step_that_fails_takes_down_only_whose_fault_it_is(alone: Any, engine: Any, monkeypatch: Any) -> None:
    one = engine("low", "before")
    run = one._worker._pass

    def fails(pieces: Any) -> Any:
        if any(piece.sequence.version and piece.sequence.version.name == "low" for piece in pieces):
            raise RuntimeError("shapes")
        return run(pieces)

    monkeypatch.setattr(one._worker, "_pass", fails)
    bad, good = one.submit(ask(PROMPTS[0], "low")), one.submit(ask(PROMPTS[0], "before"))
    assert good.result(60)[0].ids == alone.answer("before", PROMPTS[0])
    with pytest.raises(UnusableAdapterError, match="RuntimeError: shapes"):
        bad.result(60)
    settled(one)


def test_names_belong_to_tenants(alone: Any, engine: Any) -> None:
    one = engine("low")
    one.register("mine", alone.root / "low3", "x")
    one.register("low", alone.root / "low3", "x")
    assert [state.name for state in one.adapters("x")] == ["low", "mine"]
    assert [state.name for state in one.adapters("y")] == ["low"]
    with pytest.raises(UnknownAdapterError):
        one.submit(ask(PROMPTS[0], "mine", "y"))
    for tenant, name in (("x", "low3"), ("y", "low")):
        assert one.submit(ask(PROMPTS[0], "low", tenant)).result(60)[0].ids == alone.answer(name, PROMPTS[0])
    with pytest.raises(UnknownAdapterError):
        one.unregister("mine")
    settled(one)


def test_what_cannot_be_asked_is_refused(engine: Any) -> None:
    one = engine("words")
    for request, what in (
        (ask(()), "empty"),
        (ask((5, 128)), "128 is no token"),
        (ask((5,), max_tokens=64), "window of 64"),
        (ask((5,), stop=("x",)), "tokenizer"),
    ):
        with pytest.raises(ConfigError, match=what):
            one.submit(request)
    with pytest.raises(ConfigError, match="takes 5 positions"):
        one.submit(ask((5,), "words", max_tokens=62)).result(60)
    small = engine("low", memory_gb=11e-6)
    with pytest.raises(ConfigError, match="pages of 4"):
        small.submit(ask((5,), max_tokens=60))
    one.drain()
    with pytest.raises(BusyError, match="drains"):
        one.submit(ask((5,)))
    settled(one)


def test_cancelled_and_stopped_requests_end(engine: Any) -> None:
    one = engine("low", max_waiting=3, max_running=1)
    first = one.submit(ask((5,), "low", max_tokens=60, ignore_end=True))
    assert isinstance(first.next_event(60), Token)
    waiting = [one.submit(ask((5,), max_tokens=60, ignore_end=True)) for _ in range(3)]
    with pytest.raises(BusyError, match="max_waiting=3"):
        one.submit(ask((5,)))
    first.cancel()
    waiting[0].cancel()
    ends = [handle.result(60)[0].end for handle in (first, waiting[0])]
    assert [end.reason for end in ends] == ["cancelled", "cancelled"]
    one.stop()
    assert {handle.result(60)[0].end.reason for handle in waiting[1:]} <= {"cancelled", "length"}
    with pytest.raises(BusyError, match="stopped"):
        one.submit(ask((5,)))


def test_events_may_be_called_for_and_a_listener_that_is_gone_cancels(engine: Any) -> None:
    one, seen, done = engine("low"), list[Any](), threading.Event()

    def listen(event: Any) -> None:
        seen.append(event)
        if isinstance(event, Finished):
            done.set()

    def gone(event: Any) -> None:
        raise ConnectionError

    one.submit(ask((5, 9), "low", ignore_end=True), listen)
    one.submit(ask((5, 9), max_tokens=60, ignore_end=True), gone)
    assert done.wait(60)
    assert [type(event) for event in seen] == [Token] * 10 + [Finished]
    assert one.drain(60)
    assert one.statistics().finished == {"length": 1, "cancelled": 1}


def test_too_old_requests_are_given_up(engine: Any) -> None:
    one, began, seen = engine("low", max_running=1, first_token_within=0.3), threading.Event(), list[Any]()

    def slow(event: Any) -> None:
        seen.append(event)
        began.set()
        time.sleep(0.01)

    one.submit(ask((5,), max_tokens=60, ignore_end=True), slow)
    assert began.wait(60)
    with pytest.raises(BusyError, match="had no step"):
        one.submit(ask((5,), max_tokens=2)).result(60)
    assert one.drain(60)
    assert len(seen) == 61


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "mixtral", "granite"])
def test_other_families(family: str, tiny: Any, tmp_path: Path) -> None:
    """Learned positions, biases, experts, and logits that are scaled."""
    model, plain = tiny(family), tiny(family)
    host = filled(al.attach(plain, al.LoRA(r=2), "a"))
    host.save(tmp_path / "a", "a")
    with Engine(model, None, EngineSettings(page_tokens=4, max_running=4, memory_gb=0.01)) as one:
        one.register("a", tmp_path / "a")
        handles = [one.submit(ask(PROMPTS[1], name)) for name in (None, "a", None)]
        for handle, names in zip(handles, ([], ["a"], []), strict=True):
            with host.using(*names), torch.no_grad():
                out = plain.generate(
                    torch.tensor([PROMPTS[1]]), attention_mask=torch.ones(1, 9, dtype=torch.long), max_new_tokens=10,
                    do_sample=False,
                )  # fmt: skip
            assert handle.result(60)[0].ids == out[0, 9:].tolist()


@pytest.mark.parametrize(
    ("family", "why"), [("t5", "two texts"), ("bert-masked", "does not generate"), ("gemma2", "softcap")]
)
def test_models_that_cannot_be_served_are_refused(family: str, why: str, tiny: Any) -> None:
    with pytest.raises(ModelError, match=why):
        Engine(tiny(family))


def test_a_method_that_cannot_be_computed_step_by_step_is_refused(alone: Any, engine: Any) -> None:
    one = engine("low")
    alone.save("side", al.LST(), 3)
    one.register("side", alone.root / "side")
    with pytest.raises(UnusableAdapterError, match=r"may mix positions|step by step"):
        one.submit(ask((5, 9), "side")).result(60)


def test_the_model_is_given_back_as_it_was(alone: Any) -> None:
    model = tiny_llama()
    host = al.load(model, alone.root / "low", "mine")
    model.train()
    before = model(torch.tensor([PROMPTS[0]])).logits
    with Engine(model, None, EngineSettings(memory_gb=0.01)) as one:
        one.register("a", alone.root / "low3")
        assert one.submit(ask(PROMPTS[0])).result(60)[0].ids == alone.answer(None, PROMPTS[0])
        assert one.submit(ask(PROMPTS[0], "a")).result(60)[0].ids == alone.answer("low3", PROMPTS[0])
    assert model.training
    assert host.active == ("mine",)
    assert list(host.methods) == ["mine"]
    assert torch.equal(model(torch.tensor([PROMPTS[0]])).logits, before)


def test_statistics_and_pins(engine: Any) -> None:
    one = engine("low", "norms", memory_gb=100e-6)
    assert one.pin("low").pinned
    one.submit(Request((5, 9, 31), "low", Sampling(temperature=0, max_tokens=4, ignore_end=True))).result(60)
    seen = one.statistics()
    assert (seen.tokens_in, seen.tokens_out, seen.by_adapter, seen.loads) == (3, 4, {"low": 4}, 1)
    assert 0 < seen.bytes_adapters < seen.bytes_budget
    assert not one.pin("low", pinned=False).pinned


def test_a_pin_that_a_running_answer_has_no_room_beside_is_refused(engine: Any) -> None:
    one = engine("low", memory_gb=20e-6)
    running = one.submit(ask((5,), max_tokens=60, ignore_end=True))
    assert isinstance(running.next_event(60), Token)
    with pytest.raises(BusyError, match=r"'low' is not pinned|no room for the adapter 'low'"):
        one.pin("low")
    assert len(running.result(60)[0].ids) == 59
    assert one.pin("low").pinned
    with pytest.raises(ConfigError, match="pages of 4"):
        one.submit(ask((5,), max_tokens=60))


@pytest.mark.parametrize("pinned", [True, False])
def test_a_version_that_cannot_be_pinned_leaves_the_name_to_the_one_before(
    pinned: bool, alone: Any, engine: Any
) -> None:
    one = engine("low", "low3")
    one.pin("low", pinned=pinned)
    broken = alone.save("broken", METHODS["low"](), 2)
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    for name in ("low", "new"):
        with pytest.raises(UnusableAdapterError, match="not the file that was saved"):
            one.register(name, broken, pin=True)
    with pytest.raises(UnknownAdapterError):
        one.adapter("new")
    assert (one.adapter("low").version, one.adapter("low").pinned) == (1, pinned)
    assert one.submit(ask(PROMPTS[0], "low")).result(60)[0].ids == alone.answer("low", PROMPTS[0])
