"""State, checkpointing, proof of attachment, patches in the base, sharing, switching, counting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adapterlab as al
from adapterlab.core.adapter import Adapter
from adapterlab.errors import AttachError, NotTrainingError

LORA = {"r": 4, "alpha": 8.0, "targets": ["q", "v", "down"]}


class Custom(al.Method):
    def attach(self, host: Any, name: str) -> None:
        return None


class Noisy(Adapter):
    """Adds a trained shift and reports its square as an auxiliary loss."""

    def __init__(self, site: Any):
        super().__init__(site)
        self.shift = nn.Parameter(torch.full((site.shape[0],), 0.5))
        self.state: Any = None

    def around(self, run: Any, x: torch.Tensor) -> torch.Tensor:
        self.state.emit(self.shift.square().mean())
        self.state.taps["seen"] = self.state.taps.get("seen", 0) + 1
        return run(x) + self.shift


def two(model: Any, randomise: Any) -> Any:
    torch.manual_seed(0)
    host = al.attach(model, al.LoRA(**LORA), "a")
    host.attach(al.LoRA(**{**LORA, "r": 2}), "b")
    randomise(host, size=0.1)
    return host


def gradients(host: Any, batches: list[Any], names: list[str]) -> dict[str, torch.Tensor]:
    """One backward pass over forward passes that ran with different adapters, which are switched again before it."""
    host.model.train()
    total = torch.zeros(())
    for name, batch in zip(names, batches, strict=True):
        with host.using(name):
            total = total + host.model(**batch).loss
    host.activate(names[0])
    total.backward()
    found = {f"{n}:{k}": p.grad.clone() for n in host.methods for k, p in host.named_parameters(n).items()}
    host.model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_checkpointing_shows_each_forward_its_own_adapters(
    family: str, tiny: Any, batch_for: Any, randomise: Any
) -> None:
    model = tiny(family)
    targets = {"llama": ["q", "v", "down"], "gpt2": ["qkv", "down"], "t5": ["q", "v", "down"]}[family]
    host = al.attach(model, al.LoRA(r=4, targets=targets), "a")
    host.attach(al.LoRA(r=2, targets=targets), "b")
    randomise(host, size=0.1)
    batches = [batch_for(model, seed=1), batch_for(model, seed=2)]
    plain = gradients(host, batches, ["a", "b"])
    host.recompute()
    again = gradients(host, batches, ["a", "b"])
    assert all(torch.allclose(again[k], plain[k], atol=1e-5) for k in plain)
    assert all(value.abs().max() > 0 for value in plain.values())


def test_without_the_record_the_gradients_would_be_wrong(tiny: Any, batch_for: Any, randomise: Any) -> None:
    model = tiny("llama")
    torch.manual_seed(0)
    host = al.attach(model, al.LoRA(**LORA), "a")
    host.attach(al.LoRA(**LORA), "b")
    randomise(host, size=0.3)
    batches = [batch_for(model, seed=1), batch_for(model, seed=2)]
    plain = gradients(host, batches, ["a", "b"])
    host.recompute(compiled=True)  # the form that keeps no record
    again = gradients(host, batches, ["a", "b"])
    assert not all(torch.allclose(again[k], plain[k], atol=1e-3) for k in plain)


def test_checkpointing_can_be_switched_off(tiny: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.LoRA(**LORA))
    host.recompute()
    assert model.is_gradient_checkpointing
    host.recompute("none")
    assert not model.is_gradient_checkpointing


def test_checkpointing_needs_no_gradient_at_the_input(tiny: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.LoRA(**LORA))
    model.enable_input_require_grads()
    host.recompute()
    assert not model.get_input_embeddings()._forward_hooks  # the hook would break full graphs


@pytest.mark.parametrize("checkpointing", [False, True])
def test_emitted_losses_are_counted_once(checkpointing: bool, tiny: Any, batch_for: Any) -> None:
    model = tiny("llama").train()
    host = al.attach(model, Custom(), "noisy")
    for site in host.sites(al.Targets(include=["up"])):
        adapter = Noisy(site)
        adapter.state = host.state
        host.wrap("noisy", site, adapter)
    if checkpointing:
        host.recompute()
    with host.state.collect() as losses:
        loss = model(**batch_for(model)).loss
        assert len(losses) == 2
        (loss * 0 + sum(losses)).backward()
        assert len(losses) == 2
    shift = host.parameters("noisy")[0]
    assert torch.allclose(shift.grad, 2 * shift.detach() / len(shift))
    assert host.state.losses is None
    model(**batch_for(model))  # nobody collects: dropped
    assert host.state.taps["seen"] >= 2


def test_collect_nests() -> None:
    state = al.State()
    with state.collect() as outer:
        state.emit(torch.tensor(1.0))
        with state.collect() as inner:
            state.emit(torch.tensor(2.0))
        state.emit(torch.tensor(3.0))
    assert (outer, inner) == ([1.0, 3.0], [2.0])


# ------------------------------------------------------------------ proof of attachment


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classes", "t5", "mixtral", "vit"])
def test_verify_accepts_what_works_and_leaves_gradients_alone(family: str, tiny: Any, batch_for: Any) -> None:
    model = tiny(family)
    host = al.attach(model, al.LoRA(r=2, bias="all", modules_to_save=["classifier"] if family == "vit" else []))
    marked = host.parameters("default")[0]
    marked.grad = torch.full_like(marked, 7.0)
    host.verify(batch_for(model))
    assert (marked.grad == 7).all()
    assert all(p.grad is None for p in host.parameters("default")[1:])


def test_biases_of_a_copied_head_are_not_trained_beside_it(tiny: Any, batch_for: Any) -> None:
    model = tiny("bert-classes")
    host = al.attach(model, al.LoRA(r=2, targets=["q"], bias="all", modules_to_save=["classifier"]))
    assert "base.classifier.bias" not in host.tensors("default")
    assert "base.bert.pooler.dense.bias" in host.tensors("default")
    host.verify(batch_for(model))


def test_verify_notices_a_module_that_is_bypassed(tiny: Any, batch_for: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.LoRA(**LORA))
    mlp = model.model.layers[1].mlp
    weight = mlp.down_proj.weight  # a fused kernel reads the weight directly
    mlp.forward = lambda x: F.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), weight)
    with pytest.raises(NotTrainingError) as error:
        host.verify(batch_for(model))
    assert "1 adapted modules were never called: model.layers.1.mlp.down_proj" in str(error.value)
    assert "2 trainable tensors got no gradient" in str(error.value)


def test_verify_notices_a_patch_that_hides_the_adapter(tiny: Any, batch_for: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.LoRA(**LORA))
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = lambda x: nn.Linear.forward(layer, x)  # set after attaching, and it forgets what was there
    with pytest.raises(NotTrainingError, match=r"no gradient: adapter.model.layers.0.self_attn.q_proj.A"):
        host.verify(batch_for(model))


def test_verify_notices_a_tensor_nobody_uses(tiny: Any, batch_for: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.LoRA(**LORA))
    host.share("default", "unused", nn.Linear(2, 2, bias=False))
    with pytest.raises(NotTrainingError, match=r"shared\.unused\.weight"):
        host.verify(batch_for(model))


def test_verify_looks_at_live_adapters_only(tiny: Any, batch_for: Any, randomise: Any) -> None:
    model = tiny("llama")
    host = two(model, randomise)
    host.activate("b")
    host.verify(batch_for(model))


# ------------------------------------------------------------------ values in the base's own parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_owned_parameters_come_back_to_the_bit(dtype: torch.dtype, tiny: Any) -> None:
    model = tiny("llama").to(dtype)
    path = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(path)[0, :3] = torch.tensor([float("inf"), float("nan"), -0.0])
    as_bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
    before = {k: v.detach().clone().view(as_bits) for k, v in model.named_parameters()}
    host = al.attach(model, Custom())
    parameter = host.own("default", path)
    for _ in range(3):
        with torch.no_grad():
            parameter.add_(0.37)
        trained = parameter.detach().clone()
        with host.using():
            assert torch.equal(parameter.view(as_bits), before[path])
        assert torch.equal(parameter.view(as_bits), trained.view(as_bits))
    host.detach("default")
    assert all(torch.equal(v.view(as_bits), before[k]) for k, v in model.named_parameters())
    assert model.get_parameter(path) is parameter


def test_owned_parameters_take_gradients_only_while_live(tiny: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, Custom(), "a")
    parameter = host.own("a", "model.norm.weight")
    assert parameter.requires_grad
    with host.using():
        assert not parameter.requires_grad
    assert parameter.requires_grad


def test_two_owners_of_one_parameter(tiny: Any) -> None:
    model, path = tiny("llama"), "model.norm.weight"
    before = model.get_parameter(path).detach().clone()
    host = al.attach(model, Custom(), "a")
    host.own("a", path)
    with torch.no_grad():
        model.get_parameter(path).fill_(1.5)
    host.attach(Custom(), "b")
    with pytest.raises(AttachError, match=rf"{path}.*'a'"):
        host.own("b", path)
    host.activate("b")
    host.own("b", path)
    with torch.no_grad():
        model.get_parameter(path).fill_(2.5)
    with pytest.raises(AttachError, match=r"'a' and 'b' both own"):
        host.activate("a", "b")
    assert host.active == ("b",)  # the refused switch changed nothing
    host.activate("a")
    assert (model.get_parameter(path) == 1.5).all()
    host.activate("b")
    assert (model.get_parameter(path) == 2.5).all()
    host.detach("a")
    assert (model.get_parameter(path) == 2.5).all()
    assert model.get_parameter(path).requires_grad  # the other owner goes on training
    host.detach("b")
    assert torch.equal(model.get_parameter(path), before)


def test_own_names_the_nearest_parameter(tiny: Any) -> None:
    host = al.attach(tiny("llama"), Custom())
    with pytest.raises(AttachError, match=r"'model.norm.wieght'.*model.norm.weight"):
        host.own("default", "model.norm.wieght")


def test_without_originals_switching_off_is_refused(tiny: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, Custom(), "a")
    host.own("a", "model.norm.weight", keep=False)
    host.attach(al.LoRA(**LORA), "b")
    for switch in (lambda: host.activate("b"), lambda: host.detach("a"), lambda: host.using().__enter__()):
        with pytest.raises(AttachError, match=r"model\.norm\.weight"):
            switch()
    assert set(host.active) == {"a", "b"}
    host.detach("b")
    assert host.active == ("a",)


# ------------------------------------------------------------------ sharing, switching, copies of modules, counting


def test_shared_modules_live_at_the_root_and_leave_with_the_adapter(tiny: Any) -> None:
    model = tiny("llama")
    keys = set(model.state_dict())
    host = al.attach(model, Custom(), "a")
    held = host.share("a", "vectors", nn.Linear(3, 5))
    assert host.shared("a") == {"vectors": held}
    assert [p is q for p, q in zip(host.parameters("a"), held.parameters(), strict=True)] == [True, True]
    assert set(host.tensors("a")) == {"shared.vectors.weight", "shared.vectors.bias"}
    with pytest.raises(AttachError, match="'vectors'"):
        host.share("a", "vectors", nn.Linear(1, 1))
    host.detach("a")
    assert set(model.state_dict()) == keys


def test_using_restores_what_was_live_also_after_an_error(
    tiny: Any, batch_for: Any, randomise: Any, logits: Any
) -> None:
    model = tiny("llama")
    base = logits(model, batch_for(model))
    host = two(model, randomise)
    both = logits(model, batch_for(model))

    def fail() -> None:
        with host.using("a"):
            assert host.active == ("a",)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert host.active == ("a", "b")
    with host.using(), host.using("b"):
        pass
    assert torch.equal(logits(model, batch_for(model)), both)
    with host.using():
        assert torch.equal(logits(model, batch_for(model)), base)
    with pytest.raises(AttachError, match=r"'c'.*a, b"), host.using("c"):
        pass
    assert host.active == ("a", "b")


def test_names_are_checked(tiny: Any) -> None:
    host = al.attach(tiny("llama"), al.LoRA(**LORA))
    for name in ("", "a.b", "a/b", "ü"):
        with pytest.raises(AttachError, match="letters, digits"):
            host.attach(al.LoRA(**LORA), name)
    with pytest.raises(AttachError, match=r"'default' already"):
        host.attach(al.LoRA(**LORA))
    with pytest.raises(AttachError, match="needs a method"):
        al.attach(host.model, "lora", "x")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_saved_modules_are_copies_of_their_own(
    family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any
) -> None:
    model = tiny(family)
    batch, base = batch_for(model), logits(model, batch_for(model))
    host = al.attach(model, al.LoRA(**LORA, modules_to_save=["lm_head"]), "a")
    assert torch.allclose(logits(model, batch), base, atol=1e-6)
    host.attach(al.LoRA(**LORA, modules_to_save=["lm_head", "embed_tokens"]), "b")
    randomise(host)
    with host.using():
        assert torch.equal(logits(model, batch), base)  # the base's tensor, tied or not, was not touched
    with host.using("a"):
        one = logits(model, batch)
    with host.using("b"):
        assert not torch.allclose(logits(model, batch), one)
    host.detach("b")
    host.activate("a")
    assert torch.equal(logits(model, batch), one)


def test_a_module_is_not_adapted_and_copied_at_once(tiny: Any) -> None:
    model = tiny("llama")
    with pytest.raises(AttachError, match=r"lm_head is in modules_to_save and is also adapted"):
        al.attach(model, al.LoRA(targets=["lm_head"], modules_to_save=["lm_head"]))
    with pytest.raises(AttachError, match=r"inside, at q_proj"):
        al.attach(model, al.LoRA(targets=["q"], modules_to_save=[r"model\.layers\.0\.self_attn"]))
    assert al.host(model) is None


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "bert-classes", "t5", "mixtral", "vit"])
def test_summary_counts_what_a_walk_over_parameters_counts(family: str, tiny: Any) -> None:
    model = tiny(family)
    base = sum(p.numel() for p in model.parameters())
    host = al.attach(model, al.LoRA(r=3, bias="all"), "a")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    summary = host.summary()
    assert (summary.trainable, summary.total) == (trainable, total)
    sites = [s for s in host.all_sites() if s.path in host.adapters("a")]
    biases = sum(p.numel() for k, p in tiny(family).named_parameters() if k.endswith(".bias"))
    assert trainable == sum(3 * sum(s.shape) for s in sites) + biases
    assert total == base + trainable - biases
    assert f"{trainable:,} of {total:,}" in str(summary)
    assert summary.dtypes == {"trainable": {"float32": trainable}, "frozen": {"float32": total - trainable}}
    host.attach(al.LoRA(r=1), "b")
    host.activate("b")
    # neither other adapters nor what is live now change the count
    assert host.summary("a") == summary


def test_half_precision_bases_get_float32_factors(tiny: Any, batch_for: Any) -> None:
    model = tiny("llama").to(torch.bfloat16)
    host = al.attach(model, al.LoRA(**LORA))
    assert {p.dtype for p in host.parameters("default")} == {torch.float32}
    loss = model(**batch_for(model)).loss
    loss.backward()
    assert {p.grad.dtype for p in host.parameters("default")} == {torch.float32}
    assert host.summary().dtypes["trainable"].keys() == {"float32"}
    assert host.summary().dtypes["frozen"].keys() == {"bfloat16"}


def test_merging_a_copied_block_takes_its_inner_modules(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny("bert-classes")
    batch, base = batch_for(model), logits(model, batch_for(model))
    host = al.attach(model, al.LoRA(r=2, targets=["q"], lora_bias=True, modules_to_save=["pooler", "classifier"]))
    randomise(host)
    live = logits(model, batch)
    host.merge()
    assert torch.allclose(logits(model, batch), live, atol=1e-5)
    host.restore()
    assert torch.equal(logits(model, batch), live)
    host.detach("default")
    assert torch.equal(logits(model, batch), base)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_merging_keeps_the_bias_of_the_update(
    family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any
) -> None:
    model = tiny(family)
    host = al.attach(model, al.LoRA(r=2, lora_bias=True))
    randomise(host, size=0.1)
    live = logits(model, batch_for(model))
    host.merge()
    assert torch.allclose(logits(model, batch_for(model)), live, atol=1e-5)
