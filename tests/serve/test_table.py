"""Adapters that are products of factors leave no module on the model, and answer what they answer with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from served import METHODS, ask, filled, greedy, tiny_llama

import adapterlab as al
from adapterlab.core.adapter import Tokenwise
from adapterlab.core.segments import segments
from adapterlab.core.state import State
from adapterlab.engine import reordered_weights
from adapterlab.engine.products import Products, fastest
from adapterlab.errors import AttachError, UnusableAdapterError
from adapterlab.foreign.model import ADAPTERS
from adapterlab.serve.forms import OnModel
from adapterlab.serve.table import Table

PROMPTS = [(5, 9, 31), tuple(range(20, 41)), (3,)]
LONG = tuple(range(1, 53))

if fastest("cpu")[0] is None:
    pytest.skip("there is no compiler, and without a kernel there is no table", allow_module_level=True)


def test_of_a_kind_the_first_is_put_on_the_model_and_the_others_are_read(
    alone: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, wanted = ("low", "low3", "moved", "scaled", "rotated"), {}
    host = al.load(tiny_llama(), alone.save("rotated", al.RoAd(group_size=16), seed=7))
    wanted = {("rotated", prompt): greedy(host.model, prompt, 10) for prompt in PROMPTS}
    one, seen, read = engine(*names), [], Table.read
    monkeypatch.setattr(Table, "read", lambda *args: seen.append(read(*args)) or seen[-1])
    handles = [(name, p, one.submit(ask(p, name))) for name in names for p in PROMPTS]
    for name, prompt, handle in handles:
        assert handle.result(60)[0].ids == (wanted.get((name, prompt)) or alone.answer(name, prompt)), name
    assert [size is not None for size in seen] == [False, True, False, False, False]
    carrier, products = al.host(one.model), one._worker.on_model.table.products
    loaded = {v.name: v.key for v in one._worker.adapters.loaded}
    assert {name for name, key in loaded.items() if key in products} == {"low", "low3", "moved", "scaled"}
    assert {name for name, key in loaded.items() if key in carrier.methods} == {"rotated"}
    one.stop()
    assert al.host(one.model) is None


def test_every_form_reaches_the_tokens_of_its_owner_alone(alone: Any, engine: Any) -> None:
    """In steps of one owner and of several, short and long: gains, shifts, what reads outputs and what reads inputs."""
    more = {
        "split": al.DoRA(r=2), "turned": al.HRA(r=2), "behind": al.AdapterHoulsby(m=4, activation="tanh"),
        "beside": al.AdapterParallel(m=3),
    }  # fmt: skip
    names, model = ("scaled", "after", *more), tiny_llama()
    for seed, (name, method) in enumerate(more.items()):
        alone.save(name, method, seed)
    wanted = {}
    for name in names:
        host = al.load(model, alone.root / name, "a")
        wanted |= {(name, prompt): greedy(model, prompt, 10) for prompt in (*PROMPTS, LONG)}
        host.detach("a")
    one = engine(*names, "low", step_tokens=96)
    for (name, prompt), said in wanted.items():
        assert one.submit(ask(prompt, name)).result(60)[0].ids == said, name
    asked = [*wanted, *((name, p) for name in (None, "low") for p in PROMPTS)]
    handles = [(name, p, one.submit(ask(p, name))) for name, p in asked]
    for name, prompt, handle in handles:
        assert handle.result(60)[0].ids == (wanted.get((name, prompt)) or alone.answer(name, prompt)), name
    products = one._worker.on_model.table.products
    assert all(version.key in products for version in one._worker.adapters.loaded)
    assert not set(al.host(one.model).methods) & {version.key for version in one._worker.adapters.loaded}


def test_each_token_is_multiplied_by_its_own_and_those_that_went_leave_the_others_theirs() -> None:
    way, _ = fastest("cpu")
    assert way is not None
    products, module, state, x = Products(way), torch.nn.Linear(4, 3), State(), torch.randn(1, 3, 4)
    module.add_module(ADAPTERS, torch.nn.ModuleDict())
    number = products.number(module, 4, 3)
    for key, gain in {"two": 2.0, "three": 3.0}.items():
        products.take(key, {number: Tokenwise(gain=torch.full((3,), gain), shift=torch.ones(3))})
    products.take("in", {number: Tokenwise(on_input=torch.full((4,), 5.0))})

    @torch.no_grad()
    def computed(*parts: tuple[tuple[str, ...], int]) -> torch.Tensor:
        state.segments = segments(parts, by_token=True)
        y: torch.Tensor = products.computed(state, module, (x,), {}, torch.nn.Linear.forward, lambda *args: None)
        return y[0]

    plain, scaled = torch.nn.Linear.forward(module, x)[0], torch.nn.Linear.forward(module, 5 * x)[0]
    for _ in range(2):
        torch.testing.assert_close(
            computed((("three",), 1), ((), 1), (("in",), 1)), torch.stack([3 * plain[0] + 1, plain[1], scaled[2]])
        )
        torch.testing.assert_close(computed((("three",), 3)), 3 * plain + 1)
        products.drop("two")
    with pytest.raises(AttachError, match="a token can have one"):
        computed((("three", "in"), 3))
    change = Tokenwise(torch.randn(2, 4), torch.randn(3, 2), 0.5, gain=torch.randn(3), shift=torch.randn(3))
    products.take("all", {number: change})
    for tokens in (3, int(way.long) + 6):  # by the kernel, and by torch
        x = torch.randn(1, tokens, 4)
        y = torch.nn.Linear.forward(module, x)[0] + 0.5 * x[0] @ change.a.T @ change.b.T
        torch.testing.assert_close(computed((("all",), tokens)), change.gain * y + change.shift)


@pytest.mark.parametrize("per", [1, 70])  # tokens of each: by the kernel, and by torch
def test_what_reads_results_stands_beside_what_reads_inputs_and_changes_no_input(per: int) -> None:
    way, _ = fastest("cpu")
    assert way is not None
    products, module, state, x = Products(way), torch.nn.Identity(), State(), torch.randn(1, 3 * per, 4)
    module.add_module(ADAPTERS, torch.nn.ModuleDict())
    number = products.number(module, 4, 4)
    lora = Tokenwise(torch.randn(2, 4), torch.randn(4, 2), 0.5)
    behind, beside = (
        Tokenwise(torch.randn(3, 4), torch.randn(4, 3), 2.0, torch.randn(3), "tanh", reads_output)
        for reads_output in (True, False)
    )
    for key, change in {"lora": lora, "behind": behind._replace(gain=torch.full((4,), 3.0)), "beside": beside}.items():
        products.take(key, {number: change})

    def computed(*parts: tuple[tuple[str, ...], int]) -> torch.Tensor:
        state.segments, given = segments(parts, by_token=True), x.clone()
        with torch.no_grad():
            y: torch.Tensor = products.computed(state, module, (given,), {}, lambda module, x: x, lambda *args: None)
        assert torch.equal(given, x), "a module that returns its input is no place to add to"
        return y[0]

    def bottleneck(z: torch.Tensor, change: Tokenwise) -> torch.Tensor:
        return 2.0 * torch.tanh(z @ change.a.T + change.d) @ change.b.T

    one, two, three = x[0].split(per)
    wanted = [
        one + 0.5 * one @ lora.a.T @ lora.b.T,
        3 * (two + bottleneck(two, behind)),
        three + bottleneck(three, beside),
    ]
    found = computed((("lora",), per), (("behind",), per), (("beside",), per))
    torch.testing.assert_close(found, torch.cat(wanted))


def test_settings_that_change_the_product_are_another_kind(alone: Any, engine: Any, tmp_path: Path) -> None:
    one, wanted = engine("low"), {}
    for name, method in {"a": al.LoRA(r=2), "b": al.LoRA(r=2), "c": al.LoRA(r=2, alpha=9), "d": al.LoRA(r=3)}.items():
        host = filled(al.attach(tiny_llama(), method, "a"), seed=ord(name))
        one.register(name, host.save(tmp_path / name, "a"))
        with torch.no_grad():
            out = host.model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=10, do_sample=False)
        wanted[name] = out[0, len(PROMPTS[1]) :].tolist()
    for name in (*wanted, *wanted):
        assert one.submit(ask(PROMPTS[1], name)).result(60)[0].ids == wanted[name], name


def test_files_of_peft_in_half_precision_are_read_too(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of hundreds of random tensors many begin with the same number then."""
    one, wanted, seen, read = engine("norms"), {}, [], Table.read
    monkeypatch.setattr(Table, "read", lambda *args: seen.append(read(*args)) or seen[-1])
    for name in "abc":
        folder = filled(al.attach(tiny_llama(), al.LoRA(r=2, targets="all-linear"), "a"), seed=ord(name)).save(
            tmp_path / name, "a"
        )
        file = folder / "adapter_model.safetensors"
        save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
        (folder / "method.json").unlink()
        one.register(name, folder)
        model = tiny_llama()
        al.load(model, folder)
        with torch.no_grad():
            out = model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=10, do_sample=False)
        wanted[name] = out[0, len(PROMPTS[1]) :].tolist()
    for name in wanted:
        assert one.submit(ask(PROMPTS[1], name)).result(60)[0].ids == wanted[name], name
    assert [size is not None for size in seen] == [False, True, True]


def test_settings_that_were_edited_are_refused_also_where_the_kind_is_known(engine: Any, tmp_path: Path) -> None:
    one = engine("low")
    for name in "ab":
        filled(al.attach(tiny_llama(), al.LoRA(r=2), "a"), seed=ord(name)).save(tmp_path / name, "a")
        one.register(name, tmp_path / name)
    file = tmp_path / "c" / "method.json"
    (tmp_path / "b").rename(tmp_path / "c")
    said = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**said, "seal": "0" * 64}), encoding="utf-8")
    one.register("c", tmp_path / "c")
    assert one.submit(ask(PROMPTS[0], "a")).result(60)
    with pytest.raises(UnusableAdapterError, match="is not what was saved"):
        one.submit(ask(PROMPTS[0], "c")).result(60)


def test_what_is_kept_apart_is_never_left_out(alone: Any, engine: Any) -> None:
    """A pass that the table cannot compute fails, instead of giving what the base says."""
    one = engine("low", "low3")
    for name in ("low", "low3"):
        one.submit(ask(PROMPTS[0], name)).result(60)
    on_model, key = one._worker.on_model, one._worker.adapters.loaded[0].key

    @torch.enable_grad()
    def call() -> None:
        on_model.rest()
        carrier = al.host(one.model)
        carrier.state.products = on_model.table.products
        try:
            with carrier.tokens([(key, 3)]), pytest.raises(AttachError, match="without a gradient"):
                one.model(input_ids=torch.tensor([PROMPTS[0]]))
        finally:
            carrier.state.products = None
        with pytest.raises(AttachError, match="no adapter"), carrier.tokens([(key, 3)]):
            pass

    one._between_steps(call)  # the model is the engine's, whose thread is not done when an answer is


def test_what_is_wrong_in_the_table_stays_on_the_model(
    alone: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, taken = Products.take, []

    def doubled(self: Any, key: str, updates: Any) -> int:
        taken.append(key)
        return take(self, key, {n: update._replace(scale=2 * update.scale) for n, update in updates.items()})

    monkeypatch.setattr(Products, "take", doubled)
    one = engine("low", "low3")
    handles = [(name, p, one.submit(ask(p, name))) for name in ("low", "low3") for p in PROMPTS]
    for name, prompt, handle in handles:
        assert handle.result(60)[0].ids == alone.answer(name, prompt), name
    assert len(taken) == 1, "the second of the kind is not tried there again"
    assert {v.key for v in one._worker.adapters.loaded} <= set(al.host(one.model).methods)
    one.stop()
    assert al.host(one.model) is None


def test_the_first_of_a_kind_is_tried_once(alone: Any, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right, tried = OnModel._right, []
    monkeypatch.setattr(OnModel, "_right", lambda *args: tried.append(args[1].name) or right(*args))
    one = engine("low", "low3", "after", "norms")
    handles = [(name, one.submit(ask(PROMPTS[0], name))) for name in ("low", "low3", "after", "norms")]
    for name, handle in handles:
        assert handle.result(60)[0].ids == alone.answer(name, PROMPTS[0]), name
    assert tried == ["low", "after", "norms", "norms"], "what changes all tokens is tried beside others before"


def test_copies_of_weights_change_no_answer(alone: Any, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reordered_weights, "_gain", lambda weights: 1.0)
    one = engine()
    assert one.statistics().bytes_reordered > 0
    asked = [(name, prompt) for name in (None, *METHODS) for prompt in PROMPTS]
    handles = [(name, prompt, one.submit(ask(prompt, name))) for name, prompt in asked]
    for name, prompt, handle in handles:
        assert handle.result(60)[0].ids == alone.answer(name, prompt), name
    one.stop()
    assert all(type(parameter) is torch.nn.Parameter for parameter in one.model.parameters())
    assert one.statistics().bytes_reordered == 0
    assert engine(reordered_gb=0).statistics().bytes_reordered == 0
