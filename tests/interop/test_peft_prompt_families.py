"""Prompts and prefixes on families with positions, projections or heads of their own, against HF PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_peft_prompts import P, apart, peft_finds_the_cache  # noqa: F401
from torch import Tensor

import adapterlab as al
from adapterlab.methods.prompt.p_tuning_v2 import PTuningV2
from adapterlab.methods.prompt.prefix_tuning import PrefixTuning
from adapterlab.methods.prompt.prompt_tuning import PromptTuning

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
BART: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0, "vocab_size": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
MAKERS: dict[str, Any] = {
    "opt": ("OPT", "ForCausalLM", {**SIZES, "ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", {**SIZES, "intermediate_size": 48}),
    # Linear biases for other numbers of heads than a power of two come from two series.
    "bloom": ("Bloom", "ForCausalLM", {"vocab_size": 128, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "roberta": ("Roberta", "ForSequenceClassification", {**SIZES, **STILL, "intermediate_size": 48}),
    "roberta-masked": ("Roberta", "ForMaskedLM", {**SIZES, **STILL, "intermediate_size": 48}),
    "deberta": ("DebertaV2", "ForSequenceClassification", {**SIZES, **STILL, "intermediate_size": 48}),
    "bart": ("Bart", "ForConditionalGeneration", {**BART, "max_position_embeddings": 64}),
    "whisper": (
        "Whisper", "ForConditionalGeneration", {**BART, "num_mel_bins": 8, "max_source_positions": 20}
    ),
}  # fmt: skip
DECODERS = ["opt", "gpt_neox", "bloom"]
WORDS = (17, 4, 99, 31)


def make(kind: str) -> Any:
    name, head, sizes = MAKERS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def answer(model: Any, **given: Any) -> Tensor:
    return model(**given).logits.clone()


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("method", [PrefixTuning, PromptTuning])
def test_words_in_front_equal_reading_them(kind: str, method: Any) -> None:
    model, x = make(kind), ids()
    wanted = answer(model, input_ids=torch.cat([torch.tensor([WORDS, WORDS]), x], 1))[:, len(WORDS) :]
    start = {"init": "words"} if method is PromptTuning else {}
    al.attach(model, method(length=len(WORDS), words=WORDS, **start))
    assert (answer(model, input_ids=x) - wanted).abs().max() < 1e-5
    left = torch.cat([torch.zeros(2, 3, dtype=torch.long), x], 1)
    mask = (left != 0).long()
    places = {} if kind == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    assert (answer(model, input_ids=left, attention_mask=mask, **places)[:, 3:] - wanted).abs().max() < 1e-5
    right = torch.cat([x, torch.zeros(2, 3, dtype=torch.long)], 1)
    found = answer(model, input_ids=right, attention_mask=mask.flip(1))[:, :7]
    assert (found - wanted).abs().max() < 1e-5
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    assert torch.equal(*(model.generate(left, use_cache=cache, **options) for cache in (True, False)))


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("config", [peft.PrefixTuningConfig, peft.PromptTuningConfig])
def test_both_ways(kind: str, config: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = peft.get_peft_model(make(kind), config(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    torch.nn.init.normal_(theirs.prompt_encoder["default"].embedding.weight)
    given = {"input_ids": ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    wanted = answer(theirs, **given)[:, -7:]
    theirs.save_pretrained(tmp_path / "theirs")
    model = make(kind)
    host = al.load(model, tmp_path / "theirs")
    assert (answer(model, **given) - wanted).abs().max() < 1e-5
    host.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make(kind), tmp_path / "ours").eval()
    assert (answer(again, **given)[:, -7:] - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["roberta", "deberta"])
def test_a_head_that_pools_by_itself_reads_where_peft_reads(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
    theirs = peft.get_peft_model(make(kind), config).eval()
    given = {"input_ids": ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    wanted = answer(theirs, **given)
    theirs.save_pretrained(tmp_path / "theirs")
    model = make(kind)
    base = answer(model, **given)
    host = al.load(model, tmp_path / "theirs")
    assert (wanted - base).abs().max() > 0.001
    assert (answer(model, **given) - wanted).abs().max() < 1e-5
    host.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make(kind), tmp_path / "ours").eval()
    assert (answer(again, **given) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["roberta", "deberta"])
def test_it_reads_the_first_real_token_otherwise(kind: str) -> None:
    model, x = make(kind), ids()
    read = torch.cat([torch.tensor([WORDS, WORDS]), x], 1)
    with torch.no_grad():
        states = model.base_model(read).last_hidden_state[:, len(WORDS) :]
        wanted = model.classifier(states) if kind == "roberta" else model.classifier(model.pooler(states))
    al.attach(model, PromptTuning(length=len(WORDS), init="words", words=WORDS))
    assert (answer(model, input_ids=x, attention_mask=torch.ones_like(x)) - wanted).abs().max() < 1e-5


def test_padding_on_the_left_takes_no_positions_where_a_model_begins_behind_the_padding_id() -> None:
    model, x = make("roberta-masked"), ids()
    read = torch.cat([torch.tensor([WORDS, WORDS]), x], 1)
    wanted = answer(model, input_ids=read)[:, len(WORDS) :]
    al.attach(model, PromptTuning(length=len(WORDS), init="words", words=WORDS))
    for padding in (0, 3):
        left = torch.cat([torch.zeros(2, padding, dtype=torch.long), x], 1)
        found = answer(model, input_ids=left, attention_mask=(left != 0).long())[:, padding:]
        assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["bart", "whisper"])
@pytest.mark.parametrize("method", [PrefixTuning(length=P), PTuningV2(length=P)], ids=["prefix", "v2"])
def test_every_attention_of_an_encoder_decoder_gets_a_prefix(kind: str, method: al.Method, tmp_path: Path) -> None:
    model = make(kind)
    given = {"input_features": torch.randn(2, 8, 40)} if kind == "whisper" else {"input_ids": ids()}
    labels = ids(2, 5)
    base = answer(model, **given, labels=labels)
    host = al.attach(model, method)
    host.verify({**given, "labels": labels})
    assert sum(isinstance(a, PrefixTuning.Layer) for a in host.adapters("default").values()) == 6
    found = answer(model, **given, labels=labels)
    assert (found - base).abs().max() > 0.001
    host.save(tmp_path / "a")
    assert torch.equal(answer(al.load(make(kind), tmp_path / "a").model, **given, labels=labels), found)
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(*(model.generate(**given, use_cache=cache, **options) for cache in (True, False)))
