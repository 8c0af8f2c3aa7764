"""Full fine-tuning and layer freezing, and the options of LoRA that do not concern PEFT."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError, TargetError


def trained(host: Any) -> set[str]:
    return {key.removeprefix("base.") for key in host.named_parameters("default")}


# ------------------------------------------------------------------ full


@pytest.mark.parametrize("family", ["llama", "llama-tied", "t5", "bert-masked", "mixtral"])
def test_full_trains_every_parameter_once(family: str, tiny: Any, batch_for: Any) -> None:
    model = tiny(family)
    host = al.attach(model, al.Full())
    assert trained(host) == {path for path, _ in model.named_parameters()}
    assert host.summary().trainable == host.summary().total == sum(p.numel() for p in tiny(family).parameters())


def test_tied_weights_stay_tied(tiny: Any, batch_for: Any) -> None:
    model = tiny("llama-tied")
    host = al.attach(model, al.Full())
    torch.optim.SGD(host.parameters("default"), 0.1)
    model(**batch_for(model)).loss.backward()
    torch.optim.SGD(host.parameters("default"), 0.1).step()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    host.detach("default")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tiny("llama-tied").lm_head.weight)


def test_full_leaves_out_what_is_excluded(tiny: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.Full(exclude=["embed", "mlp"]))
    left_out = {path for path, _ in model.named_parameters()} - trained(host)
    assert left_out == {"model.embed_tokens.weight"} | {
        f"model.layers.{i}.mlp.{name}_proj.weight" for i in (0, 1) for name in ("gate", "up", "down")
    }
    with pytest.raises(TargetError, match="'embde'"):
        al.attach(tiny("llama"), al.Full(exclude=["embde"]))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "bert-classes", "t5"])
def test_rates_decay_from_the_top_down(family: str, tiny: Any) -> None:
    host = al.attach(tiny(family), al.Full(layer_decay=0.5))
    groups: list[Any] = []
    host.methods["default"].optimizer(host, "default", lambda given: groups.extend(given))  # type: ignore[arg-type]
    names = {id(p): key.removeprefix("base.") for key, p in host.named_parameters("default").items()}
    factor = {names[id(p)]: group["lr_factor"] for group in groups for p in group["params"]}
    assert len(factor) == len(names)
    first, second = {"t5": ("block.0.", "block.1."), "bert-classes": ("layer.0.", "layer.1.")}.get(
        family, ("layers.0.", "layers.1.")
    )
    for name, value in factor.items():
        if first in name:
            assert value == 0.5, name
        elif second in name:
            assert value == 1.0, name
    ends = {
        "llama": {"model.embed_tokens.weight": 0.25, "model.norm.weight": 1.0, "lm_head.weight": 1.0},
        "llama-tied": {"model.embed_tokens.weight": 1.0, "model.norm.weight": 1.0},
        "bert-classes": {
            "bert.embeddings.LayerNorm.weight": 0.25, "bert.embeddings.word_embeddings.weight": 0.25,
            "bert.pooler.dense.weight": 1.0, "classifier.weight": 1.0,
        },
        "t5": {"decoder.final_layer_norm.weight": 1.0, "lm_head.weight": 1.0},
    }[family]  # fmt: skip
    assert {name: factor[name] for name in ends if name in factor} == {n: v for n, v in ends.items() if n in factor}
    assert {n for n in ends if n in factor} >= set(ends) - {"lm_head.weight"}


def test_the_anchor_is_the_mean_square_of_the_change(tiny: Any) -> None:
    model = tiny("llama")
    start = {path: p.detach().clone() for path, p in model.named_parameters()}
    host = al.attach(model, al.Full(anchor=0.3, exclude=["embed"]))
    assert host.methods["default"].penalty(host, "default") == 0
    with torch.no_grad():
        for i, p in enumerate(host.parameters("default")):
            p.add_(0.01 * (i + 1))
    penalty = host.methods["default"].penalty(host, "default")
    assert penalty is not None
    changes = torch.cat([(p.detach() - start[n]).flatten() for n, p in model.named_parameters() if "embed" not in n])
    assert torch.allclose(penalty, 0.3 * changes.square().mean(), rtol=1e-5)
    path = "model.norm.weight"
    (gradient,) = torch.autograd.grad(penalty, [model.get_parameter(path)])
    assert torch.allclose(gradient, 0.6 * (model.get_parameter(path) - start[path]) / changes.numel(), rtol=1e-4)
    assert al.Full().penalty(host, "default") is None


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_without_originals_the_adapter_stays(method: str, tiny: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.method(method)(keep_base=False))
    held = sum(p.original is not None for p in host.patches["default"].values())
    assert held == 0
    with pytest.raises(AttachError, match="without keeping the original"):
        host.detach("default")
    with pytest.raises(AttachError, match="cannot be switched off"), host.using():
        pass
    assert host.active == ("default",)


@pytest.mark.parametrize("fields", [{"layer_decay": 0}, {"layer_decay": 1.5}, {"anchor": -1}, {"excluded": ["q"]}])
def test_full_refuses_impossible_settings(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        al.Full(**fields)


# ------------------------------------------------------------------ freeze


def block(*layers: int, stem: str = "model.layers.{}.") -> tuple[str, ...]:
    return tuple(stem.format(i) for i in layers)


@pytest.mark.parametrize(("layers", "expected"), [(1, block(1)), (-1, block(0)), (2, block(0, 1)), (-2, block(0, 1))])
def test_which_blocks_train(layers: int, expected: tuple[str, ...], tiny: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.Freeze(layers=layers))
    assert trained(host) == {path for path, _ in model.named_parameters() if path.startswith(expected)}
    assert {path for path, p in model.named_parameters() if p.requires_grad} == trained(host)


def test_the_last_blocks_of_an_encoder_decoder_are_the_decoders(tiny: Any) -> None:
    host = al.attach(tiny("t5"), al.Freeze(layers=1))
    assert all(path.startswith("decoder.block.1.") for path in trained(host))


def test_modules_inside_and_outside_the_blocks(tiny: Any) -> None:
    host = al.attach(tiny("llama"), al.Freeze(layers=1, modules=["input_layernorm", "mlp"], extra_modules=["norm"]))
    mlp = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    # `norm` is compared with whole names: it must not take the layers' own norms
    assert trained(host) == {"model.layers.1.input_layernorm.weight", "model.norm.weight", *mlp}
    only = al.attach(tiny("llama"), al.Freeze(layers=0, extra_modules=["lm_head"]))
    assert trained(only) == {"lm_head.weight"}


def test_an_extra_module_with_two_places_trains_in_both(tiny: Any) -> None:
    host = al.attach(tiny("t5"), al.Freeze(layers=0, extra_modules=["final_layer_norm"]))
    assert trained(host) == {"encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"}
    host = al.attach(tiny("t5"), al.Freeze(layers=0, extra_modules=["decoder.final_layer_norm"]))
    assert trained(host) == {"decoder.final_layer_norm.weight"}


def test_a_tied_head_is_the_embedding(tiny: Any) -> None:
    host = al.attach(tiny("llama-tied"), al.Freeze(layers=0, extra_modules=["lm_head"]))
    assert trained(host) == {"model.embed_tokens.weight"}


def test_interleaved_blocks_are_spread_evenly() -> None:
    every: list[Any] = [object() for _ in range(6)]
    chosen = {n: [every.index(b) for b in al.Freeze(layers=n, interleaved=True).blocks(every)] for n in (1, 2, 3, 6)}
    assert chosen == {1: [5], 2: [2, 5], 3: [1, 3, 5], 6: [0, 1, 2, 3, 4, 5]}
    with pytest.raises(AttachError, match=r"layers=4 to divide the 6 blocks"):
        al.Freeze(layers=4, interleaved=True).blocks(every)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 3}, "layers=3, but the model has 2 blocks"),
        ({"layers": -3}, "layers=-3, but the model has 2 blocks"),
        ({"layers": 0}, "trains nothing"),
        ({"modules": ["mpl"]}, r"'mpl'.*mlp"),
        ({"extra_modules": ["nrm"]}, r"'nrm'.*norm"),
        ({"extra_modules": ["input_layernorm"]}, "not outside the blocks"),
    ],
)
def test_freeze_says_what_is_wrong(fields: dict[str, Any], message: str, tiny: Any) -> None:
    model = tiny("llama")
    with pytest.raises((AttachError, TargetError), match=message):
        al.attach(model, al.Freeze(**fields))
    assert al.host(model) is None
    assert all(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------ lora


def test_lora_starts_as_the_paper_says(tiny: Any) -> None:
    host = al.attach(tiny("llama"), al.LoRA(r=16, targets=["down", "embed"]))
    linear, embedding = (
        host.adapters("default")["model.layers.0.mlp.down_proj"],
        host.adapters("default")["model.embed_tokens"],
    )
    assert (linear.B == 0).all()
    assert linear.A.abs().max() <= 1 / math.sqrt(48)
    assert linear.A.abs().max() > 0.9 / math.sqrt(48)
    assert (embedding.A == 0).all()
    assert (embedding.A.shape, embedding.B.shape) == ((16, 128), (32, 16))
    assert abs(embedding.B.std() - 1) < 0.15
    gaussian = al.attach(tiny("llama"), al.LoRA(r=16, targets=["down"], init="gaussian"))
    factors = torch.cat([a.A.flatten() for a in gaussian.adapters("default").values()])
    assert abs(factors.std() * 16 - 1) < 0.1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"r": 4, "alpha": 8}, 2.0), ({"r": 4, "alpha": 8, "scale": "sqrt"}, 4.0),
        ({"r": 4, "alpha": 8, "rank_pattern": {"q_proj": 16}}, 0.5),
        ({"r": 4, "alpha": 8, "alpha_pattern": {"attn.q_proj": 2, "q_proj": 3}}, 0.75),
        ({"r": 4, "alpha": 8, "alpha_pattern": {"self_attn.q_proj": 2, "q_proj": 3}}, 0.5),
        ({"r": 4, "alpha": 8, "alpha_pattern": {"proj": 2}}, 2.0),
        ({"r": 4, "alpha": 8, "rank_pattern": {r".*\.0\..*": 9}, "scale": "sqrt"}, 8 / 3),
    ],
)  # fmt: skip
def test_the_scale_at_a_module(fields: dict[str, Any], expected: float) -> None:
    assert al.LoRA(**fields).scaling("model.layers.0.self_attn.q_proj") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"r": 0}, ["r = 0"]), ({"alpha": 0}, ["alpha = 0"]), ({"dropout": 1}, ["dropout = 1"]),
        ({"rank_pattern": {"q": 0}}, ["rank_pattern", "0"]), ({"alpha_pattern": {"q": -1}}, ["alpha_pattern", "-1"]),
        ({"rank_pattern": {"(q": 2}}, ["rank_pattern", "'(q'", "regular expression"]),
        ({"scale": "rs"}, ["scale = 'rs'", "'linear' or 'sqrt'"]), ({"lora_alpha": 2}, ["'lora_alpha'", "alpha"]),
    ],
)  # fmt: skip
def test_lora_refuses_impossible_settings(fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        al.LoRA(**fields)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_an_error(field: str, tiny: Any) -> None:
    model = tiny("llama")
    with pytest.raises(TargetError, match=rf"{field} names 'q_porj'.*q_proj"):
        al.attach(model, al.LoRA(targets=["q"], **{field: {"q_porj": 2}}))
    assert al.host(model) is None


def test_dropout_acts_in_training_only(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.LoRA(r=4, dropout=0.5, targets=["q", "embed"]))
    randomise(host)
    still = logits(model, batch_for(model))
    assert torch.equal(still, logits(model, batch_for(model)))
    model.train()
    assert not torch.allclose(logits(model, batch_for(model)), still)
    layer = host.adapters("default")["model.layers.0.self_attn.q_proj"]
    layer.train()
    x = torch.ones(20_000, 32)
    with torch.no_grad():
        mean, still = layer(x).mean(0), layer.eval()(x[:1])[0]
    assert still.abs().max() > 5
    assert torch.allclose(mean, still, atol=0.3)  # unbiased; half of the input is missing each time


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_which_biases_train(bias: str, tiny: Any) -> None:
    model = tiny("qwen2")
    host = al.attach(model, al.LoRA(r=2, targets=["q", "o"], bias=bias))
    found = {k for k in host.named_parameters("default") if k.startswith("base.")}
    letters = {"none": "", "all": "qkv", "lora_only": "q"}[bias]
    assert found == {f"base.model.layers.{i}.self_attn.{c}_proj.bias" for i in (0, 1) for c in letters}
