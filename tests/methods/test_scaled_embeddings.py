"""Embeddings that multiply the rows they return (Gemma's): the update's share is multiplied too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import adapterlab as al
from adapterlab.registry import method

FIELDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4}, "dora": {"r": 4}, "lora_dropout": {"r": 4}, "krona": {}, "intrinsic_said": {"d": 200},
}  # fmt: skip


def gemma() -> Any:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(1, 30)[None]


@pytest.mark.parametrize("id", FIELDS)
def test_merged_and_live_agree(id: str, ids: torch.Tensor, randomise: Any) -> None:
    model = gemma()
    assert float(model.model.embed_tokens.embed_scale) == pytest.approx(32**0.5)
    with torch.no_grad():
        base = model(input_ids=ids).logits
        host = al.attach(model, method(id).model_validate({"targets": ["embed"], **FIELDS[id]}))
        randomise(host, size=0.1)
        live = model(input_ids=ids).logits
        assert (live - base).abs().max() > 0.01
        host.merge("default", tied="untie")
        assert (model(input_ids=ids).logits - live).abs().max() < 1e-4


@pytest.mark.parametrize("id", ["lora", "dora"])
def test_peft_answers_the_same(id: str, ids: torch.Tensor, randomise: Any, tmp_path: Path) -> None:
    host = al.attach(gemma(), method(id).model_validate({"targets": ["embed", "q"], **FIELDS[id]}))
    randomise(host, size=0.1)
    host.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(gemma(), tmp_path).eval()
    with torch.no_grad():
        assert (theirs(input_ids=ids).logits - host.model(input_ids=ids).logits).abs().max() < 1e-5
