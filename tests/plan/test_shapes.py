"""Known shapes, against the published numbers of parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapterlab.errors import ModelError
from adapterlab.plan.shapes import config_of, shapes, short_name

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-nemo-12b": 12_247_782_400,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952,
    "phi-2": 2_779_683_840,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_every_family_of_the_catalogue_is_there() -> None:
    known = shapes()
    for family in ("llama", "qwen2.5", "qwen3", "smollm2", "mistral", "gemma", "phi"):
        assert any(name.startswith(family) for name in known), family


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Qwen2.5-1.5B", "qwen2.5-1.5b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama3.2-1b"),
        ("meta-llama/Meta-Llama-3-8B", "llama3-8b"),
        ("google/gemma-2-2b-it", "gemma2-2b"),
        ("google/gemma-2b", "gemma-2b"),
        ("google/gemma-3-1b-it", "gemma3-1b"),
        ("mistralai/Mistral-7B-v0.3", "mistral-7b"),
        ("microsoft/phi-2", "phi-2"),
    ],
)
def test_names_as_the_hub_writes_them(given: str, name: str) -> None:
    assert short_name(given) == name
    assert name in shapes()


def test_a_local_folder_wins(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", hidden_size=48, num_hidden_layers=2, num_attention_heads=4).save_pretrained(tmp_path)
    assert config_of(tmp_path).hidden_size == 48


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"'qwen2.5-8b'.*qwen2.5-7b.*config\.json"):
        config_of("qwen2.5-8b")


def test_a_configuration_without_the_needed_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match=r"vit.*no vocab_size.*language model"):
        config_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"cannot be read.*config\.json"):
        config_of(tmp_path)
