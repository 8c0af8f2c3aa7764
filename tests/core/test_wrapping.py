"""Class swap with continuation: what stays as it was, copies, pickles, order, foreign patches of `forward`."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import adapterlab as al
from adapterlab.core.adapter import Adapter, Entrance
from adapterlab.engine.loss import Loss
from adapterlab.errors import MergeError

LORA = {"r": 4, "alpha": 8.0}
FAMILIES = ("llama", "llama-tied", "qwen2", "gpt2", "bert-classes", "bert-masked", "t5", "mixtral", "vit")


class Times(Adapter):
    """Multiply the output: adapters of this kind do not commute with `Plus`."""

    def __init__(self, site: Any, factor: float):
        super().__init__(site)
        self.factor = nn.Parameter(torch.tensor(factor))

    def around(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs) * self.factor


class Plus(Times):
    def around(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs) + self.factor


class Through(Times):
    """Change nothing, around any module."""

    def around(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)


class Custom(al.Method):
    """A method whose `attach` is given by the test."""

    def attach(self, host: Any, name: str) -> None:
        return None


def q_proj(model: Any, layer: int = 0) -> Any:
    return model.get_submodule(f"model.layers.{layer}.self_attn.q_proj")


def bits(model: Any) -> dict[str, Any]:
    return {
        "keys": list(model.state_dict()),
        "classes": {path: type(m) for path, m in model.named_modules()},
        "grads": {path: p.requires_grad for path, p in model.named_parameters()},
        "attributes": {path: sorted(m.__dict__) for path, m in model.named_modules()},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_leaves_no_trace(family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny(family)
    next(model.parameters()).requires_grad_(False)  # a state of its own to come back to
    before, values, batch = bits(model), copy.deepcopy(model.state_dict()), batch_for(model)
    plain = logits(model, batch)
    host = al.attach(model, al.LoRA(**LORA, bias="all"))
    assert {k for k in model.state_dict() if not host.is_adapter_path(k)} == set(values)
    randomise(host)
    assert (logits(model, batch) - plain).abs().max() > 1e-3
    host.detach("default")
    assert bits(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model, batch), plain)
    assert al.host(model) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_equals_the_base(family: str, tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    plain = logits(model, batch)
    al.attach(model, al.LoRA(**LORA, targets=["all-linear"]))
    assert torch.allclose(logits(model, batch), plain, atol=1e-6)


def test_a_wrapped_module_is_still_what_it_was(tiny: Any) -> None:
    model = tiny("llama")
    block, layer, signature = model.model.layers[0], q_proj(model), inspect.signature(type(model).forward)
    host = al.attach(model, Custom(), "outer")
    for module in (layer, block, model):
        host.wrap("outer", module, Through(host.site(module), 1.0))
    assert isinstance(layer, nn.Linear)
    assert isinstance(block, GradientCheckpointingLayer)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model).__qualname__ == "LlamaForCausalLM"
    assert type(model).__module__.startswith("transformers.")
    assert inspect.signature(type(model).forward) == signature  # the trainer picks dataset columns by it
    assert inspect.signature(model.forward).parameters.keys() == (signature.parameters.keys() - {"self"})
    outputs = model(input_ids=torch.arange(4)[None], output_hidden_states=True)
    assert len(outputs.hidden_states) == 3  # the recorder of hidden states matches blocks by class
    assert model.generate(torch.arange(3, 7)[None], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_saved_config_names_the_plain_class(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    host = al.attach(model, Custom())
    host.wrap("default", model, Through(host.site(model), 1.0))
    host.attach(al.LoRA(**LORA), "lora")
    host.save_base(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("family", FAMILIES)
def test_save_base_writes_exactly_the_base(
    family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    plain, model = tiny(family), tiny(family)
    plain.save_pretrained(tmp_path / "plain")
    host = al.attach(model, al.LoRA(**LORA, bias="all"))
    randomise(host)
    adapted = logits(model, batch_for(model))
    host.save_base(tmp_path / "base")
    assert torch.equal(logits(model, batch_for(model)), adapted)  # what was live is live again
    read = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "base")]
    assert read[0] == read[1]
    again = type(plain).from_pretrained(tmp_path / "base")
    assert torch.equal(logits(again.eval(), batch_for(model)), logits(plain, batch_for(model)))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_adapters_of_its_own(
    how: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny("llama")
    host = al.attach(model, al.LoRA(**LORA, targets=["q", "embed"], modules_to_save=["lm_head"]))
    host.attach(al.LoRA(**LORA, targets=["v"]), "second")
    randomise(host)
    batch = batch_for(model)
    both = logits(model, batch)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "m.pt")
        twin = torch.load(tmp_path / "m.pt", weights_only=False)
    other = al.host(twin)
    assert other is not None
    assert other is not host
    assert other.model is twin
    assert torch.equal(logits(twin, batch), both)
    other.activate()
    assert torch.equal(logits(twin, batch), logits(tiny("llama"), batch))
    assert torch.equal(logits(model, batch), both)  # the first model's switch was not touched
    for name in ("default", "second"):
        other.detach(name)
    assert bits(twin)["classes"] == bits(tiny("llama"))["classes"]


def test_attached_first_is_innermost(tiny: Any) -> None:
    model = tiny("llama")
    layer, x = q_proj(model), torch.randn(3, 32)
    base = layer(x)
    host = al.attach(model, Custom(), "plus")
    host.wrap("plus", layer, Plus(host.site(layer), 3.0))
    host.attach(Custom(), "times")
    host.wrap("times", layer, Times(host.site(layer), 2.0))
    assert torch.equal(layer(x), (base + 3) * 2)
    host.activate("times", "plus")  # the order of the call does not matter
    assert torch.equal(layer(x), (base + 3) * 2)
    host.activate("times")
    assert torch.equal(layer(x), base * 2)
    host.detach("plus")
    assert torch.equal(layer(x), base * 2)
    host.detach("times")
    assert torch.equal(layer(x), base)
    assert type(layer) is nn.Linear


class Doubles(ModelHook):
    """An accelerate hook whose effect can be seen: inputs are doubled before whatever the forward is."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (args[0] * 2,), kwargs


@pytest.mark.parametrize("removal", ["adapter first", "hook first"])
@pytest.mark.parametrize("order", ["hook, adapter", "adapter, hook"])
def test_adapters_work_inside_accelerate_hooks(order: str, removal: str, tiny: Any) -> None:
    model = tiny("llama")
    layer, x = q_proj(model), torch.randn(3, 32)
    base = layer(x)
    if order == "hook, adapter":
        add_hook_to_module(layer, Doubles())
    host = al.attach(model, Custom(), "plus")
    host.wrap("plus", layer, Plus(host.site(layer), 3.0))
    if order == "adapter, hook":
        add_hook_to_module(layer, Doubles())
    assert torch.allclose(layer(x / 2), base + 3)
    host.activate()
    assert torch.allclose(layer(x / 2), base)
    host.activate("plus")
    if removal == "hook first":
        remove_hook_from_module(layer)
        assert torch.allclose(layer(x), base + 3)
        host.detach("plus")
    else:
        host.detach("plus")
        assert torch.allclose(layer(x / 2), base)
        remove_hook_from_module(layer)
    assert torch.equal(layer(x), base)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("order", ["offload, adapter", "adapter, offload"])
@pytest.mark.parametrize("how", ["cpu_offload", "dispatch_model"])
def test_adapters_work_on_dispatched_models(
    how: str, order: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any
) -> None:
    def dispatch(model: Any) -> None:
        if how == "cpu_offload":
            cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)

    expected_model, model = tiny("llama").double(), tiny("llama").double()
    batch = batch_for(model)
    base = logits(model, batch)
    torch.manual_seed(0)
    randomise(al.attach(expected_model, al.LoRA(**LORA)))
    expected = logits(expected_model, batch)
    torch.manual_seed(0)
    if order == "offload, adapter":
        dispatch(model)
    host = al.attach(model, al.LoRA(**LORA))
    randomise(host)
    host.verify(batch)
    if order == "adapter, offload":
        dispatch(model)
    assert torch.allclose(logits(model, batch), expected, atol=1e-6)
    with host.using():
        assert torch.allclose(logits(model, batch), base, atol=1e-6)
    host.detach("default")
    assert torch.allclose(logits(model, batch), base, atol=1e-6)


@pytest.mark.parametrize("order", ["patch, adapter", "adapter, patch"])
def test_a_foreign_patch_of_forward_is_kept(order: str, tiny: Any) -> None:
    model = tiny("llama")
    layer, x = q_proj(model), torch.randn(3, 32)
    base = layer(x)

    def patch() -> None:
        inner = layer.forward
        layer.forward = lambda x: inner(x) * 10

    if order == "patch, adapter":
        patch()
    host = al.attach(model, Custom(), "plus")
    host.wrap("plus", layer, Plus(host.site(layer), 3.0))
    if order == "adapter, patch":
        patch()
    inside = order == "patch, adapter"
    assert torch.allclose(layer(x), base * 10 + 3 if inside else (base + 3) * 10)
    host.detach("plus")
    assert torch.allclose(layer(x), base * 10)


def test_an_aligned_hook_survives_a_deepcopy(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny("llama")
    add_hook_to_module(q_proj(model), AlignDevicesHook(execution_device="cpu"))
    host = al.attach(model, al.LoRA(**LORA))
    randomise(host)
    twin = copy.deepcopy(model)
    batch = batch_for(model)
    expected = logits(model, batch)
    al.host(twin).activate()  # type: ignore[union-attr]
    assert torch.equal(logits(model, batch), expected)
    assert not torch.equal(logits(twin, batch), expected)


class Boom(al.LoRA):
    """Fails after it has attached everything."""

    def attach(self, host: Any, name: str) -> None:
        super().attach(host, name)
        host.own(name, "lm_head.weight")
        host.share(name, "vectors", nn.Linear(2, 2))
        raise RuntimeError("late")


@pytest.mark.parametrize("alone", [True, False])
def test_a_failed_attach_leaves_the_model_as_it_was(alone: bool, tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("llama")
    if not alone:
        al.attach(model, al.LoRA(**LORA), "first")
    before, values, out = bits(model), copy.deepcopy(model.state_dict()), logits(model, batch_for(model))
    with pytest.raises(RuntimeError, match="late"):
        al.attach(model, Boom(**LORA), "bad")
    assert bits(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model, batch_for(model)), out)
    host = al.host(model)
    assert (host is None) if alone else (host is not None and tuple(host.methods) == ("first",))


def test_one_full_graph(tiny: Any, batch_for: Any, randomise: Any) -> None:
    torch._dynamo.reset()
    model = tiny("llama")
    host = al.attach(model, al.LoRA(**LORA, targets=["q", "down", "embed", "head"]))
    randomise(host, size=0.1)
    batch = batch_for(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # and its backward pass
    loss, plain = compiled(**batch).loss, model(**batch).loss
    assert torch.allclose(loss, plain, atol=1e-5)
    grads = [torch.autograd.grad(value, host.parameters("default")) for value in (loss, plain)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))
    with host.using(), torch.no_grad():
        assert torch.allclose(compiled(**batch).loss, tiny("llama")(**batch).loss, atol=1e-5)
    torch._dynamo.reset()


def test_parts_of_a_composite_are_switched_and_removed_together(tiny: Any, batch_for: Any, logits: Any) -> None:
    class Pair(Custom):
        def attach(self, host: Any, name: str) -> None:
            host.compose(name, "a", al.LoRA(**LORA, targets=["q"], init="gaussian"))
            host.compose(name, "b", al.LoRA(**LORA, targets=["q", "v"], bias="all"))

    model = tiny("qwen2")
    before, batch = bits(model), batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, Pair(), "pair")
    with torch.no_grad():
        for value in host.tensors("pair").values():
            value.add_(0.1)
    changed = logits(model, batch)
    host.attach(al.LoRA(**LORA), "other")
    with host.using():
        assert torch.equal(logits(model, batch), base)
    assert host.active == ("pair", "other")
    host.detach("other")
    assert torch.equal(logits(model, batch), changed)
    host.detach("pair")
    assert bits(model) == before
    assert torch.equal(logits(model, batch), base)


class Taking(Entrance):
    """Multiply the embedded words by an argument that the model does not have."""

    takes = ("loudness",)

    @contextlib.contextmanager
    def entering(self, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
        loud = given.pop("loudness", None)
        if loud is not None:
            given["inputs_embeds"] = loud * self.site.module.get_input_embeddings()(given.pop("input_ids"))
        yield given


class Loud(al.Method):
    """Put `Taking` around the whole model."""

    id = "loud"

    def attach(self, host: Any, name: str) -> None:
        host.wrap(name, host.model, Taking(host.site(host.model)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_an_entrance_takes_shows_in_the_signature_as_long_as_it_is_there(family: str, tiny: Any) -> None:
    model = tiny(family)
    plain = inspect.signature(model.forward)
    host = al.attach(model, Loud(), "loud")
    host.attach(Custom(), "other")
    ids = torch.arange(3, 9)[None]
    assert "loudness" in inspect.signature(model.forward).parameters
    assert [k for k in inspect.signature(model.forward).parameters if k != "loudness"] == list(plain.parameters)
    with torch.no_grad():
        quiet, loud = model(ids).logits, model(ids, loudness=2.0).logits
        assert not torch.equal(quiet, loud)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids, loudness=2.0).logits, loud)
            assert "loudness" in inspect.signature(other.forward).parameters
        quick = Loss(model)
        assert quick.path == "chunked"
        for batch in ({"input_ids": ids, "labels": ids}, {"input_ids": ids, "labels": ids, "loudness": 2.0}):
            torch.testing.assert_close(quick(batch), model(**batch).loss)
        assert not torch.equal(
            model.generate(ids, loudness=2.0, max_new_tokens=1, do_sample=False, pad_token_id=0), ids
        )
        host.merge("loud")
        assert torch.equal(model(ids, loudness=2.0).logits, loud)  # it has no weight to be merged into
        with pytest.raises(MergeError, match="merged already"):
            host.merge("loud")
        host.restore("loud")
    host.detach("loud")
    assert inspect.signature(model.forward) == plain
    with pytest.raises(ValueError, match="loudness"):
        model.generate(ids, loudness=2.0, max_new_tokens=1, pad_token_id=0)


def test_what_an_entrance_takes_shows_behind_the_hooks_of_accelerate(tiny: Any) -> None:
    model, ids = tiny("llama"), torch.arange(3, 9)[None]
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True))
    before = inspect.signature(model.forward)
    host = al.attach(model, Loud(), "loud")
    made = model.generate(ids, loudness=2.0, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 7)
    assert "loudness" in inspect.signature(model.forward).parameters
    host.detach("loud")
    assert inspect.signature(model.forward) == before
