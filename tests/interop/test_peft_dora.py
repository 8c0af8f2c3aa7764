"""DoRA against HF PEFT, both ways: what one writes the other reads, to the same logits."""

from __future__ import annotations

from typing import Any

import peft
import pytest

import adapterlab as al

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:fan_in_fan_out is set")

OURS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4}),
    ("gpt2", {"r": 4, "scale": "sqrt", "rank_pattern": {"c_fc": 2}}),
    ("qwen2", {"r": 4, "bias": "lora_only", "dropout": 0.3}),
    ("bert-classes", {"r": 4, "modules_to_save": ["classifier"]}),
    ("llama", {"r": 4, "targets": ["embed", "o"]}),
    ("t5", {"r": 2}),
]  # fmt: skip
THEIRS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    ("gpt2", {"r": 4, "use_dora": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ("llama", {"r": 4, "use_dora": True, "target_modules": ["embed_tokens"]}),
    ("qwen2", {"r": 4, "use_dora": True, "use_rslora": True, "target_modules": "all-linear"}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields"), OURS)
def test_peft_reads_what_we_write(family: str, fields: dict[str, Any], peft_reads: Any) -> None:
    peft_reads(family, al.DoRA(**fields), effect=0.01)


@pytest.mark.parametrize(("family", "options"), THEIRS)
def test_we_read_what_peft_writes(family: str, options: dict[str, Any], we_read: Any) -> None:
    we_read(family, peft.LoraConfig(**options), "dora", effect=0.01)
