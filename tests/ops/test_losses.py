"""Chunked cross-entropy against plain autograd; `Loss` against the model's own loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterlab as al
from adapterlab.engine.loss import Loss
from adapterlab.errors import ConfigError
from adapterlab.ops import cross_entropy
from adapterlab.ops.cross_entropy import linear_cross_entropy, module_cross_entropy
from adapterlab.train import Loop, Training

CAUSAL = ("llama", "llama-tied", "qwen2", "gpt2", "mixtral", "gemma2", "granite", "cohere")


def data(bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=draw, dtype=torch.float64)
    weight = torch.randn(13, 6, generator=draw, dtype=torch.float64)
    shift = torch.randn(13, generator=draw, dtype=torch.float64) if bias else None
    return hidden.requires_grad_(), weight, shift, torch.randint(0, 13, (11,), generator=draw)


@pytest.mark.parametrize("elements", [1, 13, 40, 13 * 11, 10**6])  # 1, 1, 3, 11 and more rows a chunk
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_losses_equal_the_plain_one(elements: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", elements)
    hidden, weight, shift, labels = data(bias)
    expected = F.cross_entropy(F.linear(hidden, weight, shift), labels, reduction="sum")
    (wanted,) = torch.autograd.grad(expected * 0.7, hidden)
    ours = linear_cross_entropy(hidden, weight, shift, labels)
    assert torch.allclose(ours.double(), expected, rtol=1e-6)
    assert torch.allclose(torch.autograd.grad(ours * 0.7, hidden)[0], wanted, atol=1e-6)
    through = module_cross_entropy(hidden, lambda h: F.linear(h, weight, shift), labels, 13)
    assert torch.allclose(through.double(), expected, rtol=1e-6)
    assert torch.allclose(torch.autograd.grad(through * 0.7, hidden)[0], wanted, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, shift, labels), ours)


@pytest.mark.parametrize("elements", [13, 10**6])
def test_a_trainable_head_gets_its_gradient(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", elements)
    hidden, weight, shift, labels = data(True)
    weight.requires_grad_()
    expected = F.cross_entropy(F.linear(hidden, weight, shift), labels, reduction="sum")
    found = module_cross_entropy(hidden, lambda h: F.linear(h, weight, shift), labels, 13)
    pairs = (torch.autograd.grad(loss, (hidden, weight)) for loss in (expected, found))
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(*pairs, strict=True))


def test_extreme_logits_and_an_untouched_input() -> None:
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    weight = torch.eye(2)
    loss = linear_cross_entropy(hidden, weight, None, torch.tensor([1]))
    assert loss == 2e4
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], torch.tensor([[1.0, -1.0]]))
    assert torch.equal(hidden.detach(), torch.tensor([[1e4, -1e4]]))


def test_half_precision_hidden_states_sum_in_float32() -> None:
    hidden = torch.randn(500, 8).bfloat16().requires_grad_()
    weight, labels = torch.randn(32, 8).bfloat16(), torch.randint(0, 32, (500,))
    loss = linear_cross_entropy(hidden, weight, None, labels)
    exact = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")
    assert loss.dtype == torch.float32
    assert torch.allclose(loss.double(), exact, rtol=2e-3)
    assert torch.autograd.grad(loss, hidden)[0].dtype == torch.bfloat16


def test_no_logits_are_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 64)
    hidden, weight = torch.randn(100, 4, requires_grad=True), torch.randn(64, 4)
    labels, sizes = torch.randint(0, 64, (100,)), []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear_cross_entropy(hidden, weight, None, labels)
        module_cross_entropy(hidden, nn.Linear(4, 64), labels, 64)
    assert max(sizes) <= hidden.numel()


def compare(model: Any, batch: dict[str, Tensor], parameters: list[Tensor]) -> Loss:
    """Value and gradients of `Loss` against the model's own loss."""
    loss = Loss(model)
    found, expected = loss(batch), model(**batch).loss
    assert torch.allclose(found, expected, rtol=1e-5)
    pairs = [torch.autograd.grad(value, parameters) for value in (found, expected)]
    assert all(torch.allclose(p, q, atol=1e-6, rtol=1e-4) for p, q in zip(*pairs, strict=True))
    return loss


@pytest.mark.parametrize("family", [*CAUSAL, "t5"])
def test_loss_equals_the_models_own(
    family: str, tiny: Any, batch_for: Any, randomise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 3 * 128)
    model = tiny(family)
    host = al.attach(model, al.LoRA(r=4, targets=["all-linear"]))
    randomise(host, size=0.1)
    loss = compare(model, batch_for(model), host.parameters("default"))
    assert loss.path == ("model" if family == "t5" else "chunked")
    forms = {"gemma2": (1.0, 1.0), "granite": (0.25, None), "cohere": (0.25, None)}
    assert loss.form[:2] == forms.get(family, (1.0, None))
    assert loss.why


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("how", ["adapted head", "saved head", "full"])
def test_loss_with_a_head_that_trains(
    how: str, family: str, tiny: Any, batch_for: Any, randomise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 3 * 128)
    model = tiny(family)
    methods = {
        "adapted head": al.LoRA(r=4, targets=["head", "down"]),
        "saved head": al.LoRA(r=4, targets=["down"], modules_to_save=["lm_head"]),
        "full": al.Full(),
    }
    host = al.attach(model, methods[how])
    randomise(host, size=0.1)
    assert compare(model, batch_for(model), host.parameters("default")).path == "chunked"
    with host.using():  # the same object must follow a switch
        loss = Loss(model)
        assert torch.allclose(loss(batch_for(model)), tiny(family)(**batch_for(model)).loss, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [30.0, 0.7, 50.5, None])
def test_a_cap_is_measured_although_it_does_not_bite_yet(cap: float | None, dtype: torch.dtype, tiny: Any) -> None:
    from transformers import Gemma2ForCausalLM

    config = tiny("gemma2").config
    config.final_logit_softcapping = cap  # logits of a small random model are far below most of these
    loss = Loss(Gemma2ForCausalLM(config).to(dtype))
    assert (loss.path, *loss.form) == ("chunked", 1.0, cap, 0.0, 0.0)
    assert ("caps" in loss.why) == (cap is not None)


@pytest.mark.parametrize("scale", [0.0625, 1 / 7, 3.0])
def test_a_scale_is_measured_in_half_precision_too(scale: float, tiny: Any) -> None:
    model = tiny("cohere").bfloat16()
    model.logit_scale = scale
    loss = Loss(model)
    assert loss.path == "chunked"
    assert loss.form.scale == pytest.approx(scale, rel=1e-5)
    assert "multiplies" in loss.why


@pytest.mark.parametrize("change", [torch.relu, lambda x: x + 1, lambda x: x.roll(1, -1), torch.sin])
def test_anything_else_done_to_the_logits_is_left_to_the_model(change: Any, tiny: Any) -> None:
    model = tiny("cohere")

    class Factor:
        def __rmul__(self, logits: Tensor) -> Tensor:
            return change(logits)

    model.logit_scale = Factor()
    loss = Loss(model, smoothing=0.1)
    assert loss.path == "model"
    assert loss.form == cross_entropy.TokenForm(smoothing=0.1)
    assert "output head" in loss.why


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "t5", "mixtral"])
def test_smoothing_and_z_loss_for_every_path(family: str, tiny: Any, batch_for: Any) -> None:
    model = tiny(family)
    model.config.output_router_logits = family == "mixtral"  # its own loss has a further term, which stays
    host = al.attach(model, al.LoRA(r=4))
    batch, loss = batch_for(model), Loss(model, smoothing=0.1, z_loss=0.01)
    assert loss.path == ("model" if family in ("t5", "mixtral") else "chunked")
    output = model(**batch)
    logits, labels = output.logits, batch["labels"]
    if family != "t5":
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.flatten(0, 1), labels.flatten()
    smoothed = F.cross_entropy(logits, labels, label_smoothing=0.1) - F.cross_entropy(logits, labels)
    expected = output.loss + smoothed + 0.01 * logits.logsumexp(-1)[labels != -100].square().mean()
    found = loss(batch)
    assert torch.allclose(found, expected, rtol=1e-5)
    pairs = [torch.autograd.grad(value, host.parameters("default")) for value in (found, expected)]
    assert all(torch.allclose(p, q, atol=1e-6, rtol=1e-4) for p, q in zip(*pairs, strict=True))


def test_options_that_need_logits_are_refused_without_them(tiny: Any, batch_for: Any) -> None:
    model = tiny("t5")
    loss, batch = Loss(model, smoothing=0.25), batch_for(model)
    forward = model.forward
    model.forward = lambda **kwargs: type("Output", (), {"loss": forward(**kwargs).loss, "logits": None})()
    with pytest.raises(
        ConfigError, match=r"label_smoothing=0.25 .* no logits.* Set training.label_smoothing"
    ) as caught:
        loss(batch)
    assert "encoder-decoder" in str(caught.value)
    assert Loss(model)(batch).isfinite()


def test_the_loop_trains_with_the_options_and_evaluates_without(tiny: Any) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}]
    found = {}
    for name, options in {"plain": {}, "options": {"label_smoothing": 0.2, "z_loss": 0.1}}.items():
        host = al.attach(tiny("llama"), al.LoRA(r=2))
        loop = Loop(host, "default", rows, Training(steps=1, proof_steps=0, **options), eval_rows=rows)
        found[name] = loop.evaluate(), loop.step()["loss"]
    assert found["plain"][0] == found["options"][0] == pytest.approx(found["plain"][1], rel=1e-5)
    assert found["options"][1] > found["plain"][1] + 0.1


@pytest.mark.parametrize(
    "wrong", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1e-4}, {"z_loss": float("inf")}]
)
def test_options_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Training(**wrong)


def test_further_losses_of_the_model_are_not_dropped(tiny: Any, batch_for: Any) -> None:
    model = tiny("mixtral")
    host = al.attach(model, al.LoRA(r=2))
    assert Loss(model).path == "chunked"
    model.config.output_router_logits = True  # a balancing loss with a factor of 0.001 joins
    assert compare(model, batch_for(model), host.parameters("default")).path == "model"


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
def test_a_total_makes_accumulated_gradients_equal_those_of_one_batch(family: str, tiny: Any, batch_for: Any) -> None:
    model = tiny(family)
    host = al.attach(model, al.LoRA(r=4))
    loss, batch = Loss(model), batch_for(model, rows=4)
    whole = loss(batch)
    expected = torch.autograd.grad(whole, host.parameters("default"))
    total = loss.tokens(batch)
    own = batch["labels"] if family == "t5" else batch["labels"][:, 1:]
    assert total == int((own != -100).sum())
    parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    assert len({loss.tokens(part) for part in parts}) > 1 or family == "t5"  # rows of different weight
    value = sum(loss(part, total) for part in parts)
    assert torch.allclose(value, whole, rtol=1e-5)
    found = torch.autograd.grad(value, host.parameters("default"))
    assert all(torch.allclose(p, q, atol=1e-6, rtol=1e-4) for p, q in zip(found, expected, strict=True))


def test_the_head_is_recomputed_with_the_adapters_of_its_own_forward(tiny: Any, batch_for: Any, randomise: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.LoRA(r=4, targets=["head"]), "a")
    host.attach(al.LoRA(r=4, targets=["head"]), "b")
    randomise(host)
    batch, parameters = batch_for(model), host.parameters("a") + host.parameters("b")

    def both(value: Any) -> Any:
        with host.using("a"):
            first = value()
        with host.using("b"):
            second = value()
        host.activate("a")
        return torch.autograd.grad(first + 2 * second, parameters)

    loss = Loss(model)
    found, expected = both(lambda: loss(batch)), both(lambda: model(**batch).loss)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(found, expected, strict=True))
    assert all(p.abs().max() > 0 for p in found)


def test_models_without_a_plain_head_use_their_own_loss(tiny: Any, batch_for: Any) -> None:
    for family in ("bert-classes", "vit", "t5"):
        assert Loss(tiny(family)).path == "model"


def test_trying_leaves_mode_and_hooks_alone(tiny: Any) -> None:
    model = tiny("llama").train()
    Loss(model)
    assert model.training
    assert not model.lm_head._forward_hooks
