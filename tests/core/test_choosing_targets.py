"""Choosing modules: roles on every family, all forms of an entry, and what a mistake is answered with."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError, TargetError
from adapterlab.foreign.roles import role_of
from adapterlab.hosts import Host

# family -> role -> number of modules (two layers; T5 has two in the encoder, two in the decoder with cross-attention)
COUNTS: dict[str, dict[str, int]] = {
    "llama": {"q": 2, "k": 2, "v": 2, "o": 2, "gate": 2, "up": 2, "down": 2, "embed": 1, "head": 1},
    "qwen2": {"q": 2, "k": 2, "v": 2, "o": 2, "gate": 2, "up": 2, "down": 2, "embed": 1, "head": 1},
    "gpt2": {"qkv": 2, "o": 2, "up": 2, "down": 2, "embed": 1, "position": 1, "head": 1},
    "bert-classes": {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2, "embed": 1, "position": 1, "head": 1},
    "bert-tokens": {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2, "embed": 1, "position": 1, "head": 1},
    "bert-masked": {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2, "embed": 1, "position": 1, "head": 1},
    "t5": {"q": 6, "k": 6, "v": 6, "o": 6, "up": 4, "down": 4, "embed": 3, "head": 1},
    "mixtral": {"q": 2, "k": 2, "v": 2, "o": 2, "embed": 1, "head": 1},
    "vit": {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2, "head": 1},
}
# linear modules of the backbone: layers times matrices, plus BERT's pooler
ALL_LINEAR = {
    "llama": 14, "qwen2": 14, "gpt2": 8, "bert-classes": 13, "bert-tokens": 12, "bert-masked": 12, "t5": 32,
    "mixtral": 8, "vit": 12,
}  # fmt: skip
BLOCKS = {"t5": 4}


def paths(model: Any, kinds: Any = ("linear", "embedding"), **targets: Any) -> list[str]:
    return [site.path for site in Host(model).sites(al.Targets(**targets), kinds)]


@pytest.mark.parametrize("family", COUNTS)
def test_roles_find_the_expected_modules(family: str, tiny: Any) -> None:
    model = tiny(family)
    found = {role: len(paths(model, include=[role])) for role in COUNTS[family]}
    assert found == COUNTS[family]


@pytest.mark.parametrize("family", COUNTS)
def test_all_linear_is_every_linear_layer_but_the_heads(family: str, tiny: Any) -> None:
    model = tiny(family)
    found = paths(model, include=["all-linear"])
    assert len(found) == ALL_LINEAR[family]
    heads = ("lm_head", "classifier", "cls", "pooler") if family != "bert-classes" else ("classifier",)
    assert not [path for path in found if path.split(".")[0] in heads]


@pytest.mark.parametrize("family", COUNTS)
def test_layers_are_the_blocks(family: str, tiny: Any) -> None:
    layers = Host(tiny(family)).layers
    assert len(layers) == BLOCKS.get(family, 2)
    assert all(type(layer).__name__.endswith(("Layer", "Block")) for layer in layers)
    assert len({type(layer) for layer in layers}) == 1


def test_layers_of_an_encoder_and_decoder_of_different_classes() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    size = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 8))
    }
    model = BartForConditionalGeneration(BartConfig(vocab_size=16, d_model=8, max_position_embeddings=8, **size))
    names = [type(layer).__name__ for layer in Host(model).layers]
    assert names == ["BartEncoderLayer"] * 2 + ["BartDecoderLayer"] * 2


def test_a_model_without_layers_says_so() -> None:
    with pytest.raises(AttachError, match="no list of layers"):
        _ = Host(nn.Sequential(nn.Linear(2, 2))).layers


def test_order_is_that_of_the_model_whatever_the_entries_say(tiny: Any) -> None:
    model = tiny("llama")
    assert paths(model, include=["v", "q"]) == paths(model, include=["q", "v"])
    assert paths(model, include=["v", "q"])[0].endswith("layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("entry", "count"),
    [
        ("q_proj", 2), ("self_attn.q_proj", 2), ("layers.1.self_attn.q_proj", 1), ("model.layers.0.mlp.up_proj", 1),
        (r".*layers\.0\..*_proj", 7), (r".*\.(q|k)_proj", 4), ("lm_head", 1), (r"lm_head|model\.embed_tokens", 2),
    ],
)  # fmt: skip
def test_forms_of_an_entry(entry: str, count: int, tiny: Any) -> None:
    assert len(paths(tiny("llama"), include=[entry])) == count
    assert len(paths(tiny("llama"), include=entry)) == count


@pytest.mark.parametrize("entry", ["proj", "_proj", "q_pro", "elf_attn.q_proj"])
def test_a_name_matches_whole_parts_only(entry: str, tiny: Any) -> None:
    with pytest.raises(TargetError, match="matches no module"):
        paths(tiny("llama"), include=[entry])


def test_an_expression_matches_the_whole_path(tiny: Any) -> None:
    with pytest.raises(TargetError, match="matches no module"):
        paths(tiny("llama"), include=[r"layers\.0.*q_proj"])  # would be found by a search, not by a full match


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("0", {0}), ("1", {1}), ("-1", {1}), ("-2", {0}), ("0-1", {0, 1}), ("0, -1", {0, 1}), ((1,), {1}), ((-2,), {0}),
     ("-2--1", {0, 1}), ("0--1", {0, 1})],
)  # fmt: skip
def test_layer_ranges(layers: Any, expected: set[int], tiny: Any) -> None:
    found = paths(tiny("llama"), include=["q", "down"], layers=layers)
    assert {int(path.split(".")[2]) for path in found} == expected
    assert len(found) == 2 * len(expected)


@pytest.mark.parametrize("layers", ["2", "0-2", "-3", "1-0", (2,), (0, 5)])
def test_layers_out_of_range_are_refused(layers: Any, tiny: Any) -> None:
    with pytest.raises(TargetError, match=r"layers 0-1"):
        paths(tiny("llama"), include=["q"], layers=layers)


@pytest.mark.parametrize("layers", ["a", "1..2", "", "0-", "0,,1"])
def test_unreadable_layers_name_the_form(layers: str) -> None:
    with pytest.raises(ConfigError, match="for example '0-3, 8, -1'"):
        al.Targets(include=["q"], layers=layers)


def test_exclusions(tiny: Any) -> None:
    model = tiny("llama")
    assert len(paths(model, include=["all-linear"], exclude=["o", r".*\.1\..*"])) == 6
    assert len(paths(model, include=["all-linear", "head"], exclude=["lm_head"])) == 14
    with pytest.raises(TargetError, match=r"targets.exclude: 'k_porj'.*k_proj"):
        paths(model, include=["q"], exclude=["k_porj"])


def test_removing_everything_is_an_error(tiny: Any) -> None:
    with pytest.raises(TargetError, match="leaves no module of LlamaForCausalLM"):
        paths(tiny("llama"), include=["q"], exclude=["q_proj"])
    with pytest.raises(TargetError, match="leaves no module"):
        paths(tiny("llama"), include=["head"], layers="0")


def test_an_entry_that_matches_nothing_is_an_error_even_if_others_match(tiny: Any) -> None:
    model = tiny("llama")
    with pytest.raises(TargetError) as error:
        al.attach(model, al.LoRA(targets=["q", "v_porj"]))
    assert "'v_porj'" in str(error.value)
    assert "v_proj" in str(error.value).split("Nearest")[1]
    assert "adapterlab targets" in str(error.value)
    assert al.host(model) is None
    with pytest.raises(TargetError, match=r"'qkv'.*Roles here:.*gate"):
        paths(model, include=["qkv"])


@pytest.mark.parametrize("entry", ["norm", "input_layernorm", "self_attn", "mlp"])
def test_a_kind_the_method_cannot_adapt_is_refused(entry: str, tiny: Any) -> None:
    with pytest.raises(TargetError, match="linear or embedding") as error:
        al.attach(tiny("llama"), al.LoRA(targets=["q", entry]))
    if entry == "self_attn":
        assert "k_proj, o_proj, q_proj, v_proj" in str(error.value)


@pytest.mark.parametrize("entry", ["(", "[q", "q_proj(", "*q"])
def test_a_malformed_expression_is_named(entry: str, tiny: Any) -> None:
    with pytest.raises(TargetError, match="not a valid regular expression") as error:
        paths(tiny("llama"), include=[entry])
    assert repr(entry) in str(error.value)


@pytest.mark.parametrize("value", [5, None, [], "", [""], [1], {"include": 5}, {"includes": ["q"]}])
def test_unusable_targets_are_config_errors(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?i)targets"):
        al.LoRA(targets=value)


def test_tied_heads_and_embeddings_are_marked(tiny: Any) -> None:
    tied = {s.path for s in Host(tiny("llama-tied")).all_sites() if s.tied}
    assert tied == {"model.embed_tokens", "lm_head"}
    assert not [s for s in Host(tiny("llama")).all_sites() if s.tied]


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("bert.encoder.layer.0.attention.output.dense", "o"), ("bert.encoder.layer.0.output.dense", "down"),
        ("bert.encoder.layer.0.intermediate.dense", "up"), ("bert.pooler.dense", None),
        ("gpt_neox.layers.3.attention.dense", "o"), ("transformer.h.0.attn.c_proj", "o"),
        ("transformer.h.0.mlp.c_proj", "down"), ("model.layers.0.mlp.experts", None),
    ],
)  # fmt: skip
def test_ambiguous_names_are_decided_by_their_parent(path: str, role: str | None) -> None:
    assert role_of(path) == role
