"""IA3 against HF PEFT, both ways: what one writes the other reads, to the same logits."""

from __future__ import annotations

from typing import Any

import peft
import pytest

import adapterlab as al

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:fan_in_fan_out is set")

OURS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in ("llama", "qwen2", "gpt2", "bert-classes", "t5", "vit", "mixtral")),
    ("llama", {"targets": "all-linear", "feedforward": ["down", "o"]}),
    ("gpt2", {"targets": "all-linear", "feedforward": ["mlp.c_proj"]}),
    ("llama", {"targets": {"include": "all-linear", "layers": "1"}, "feedforward": "layers.1.mlp.down_proj"}),
    ("llama", {"targets": ["v"], "feedforward": []}),
]  # fmt: skip
THEIRS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    ("llama", {"target_modules": ["k_proj", "o_proj"], "feedforward_modules": []}),
    ("llama", {"target_modules": r".*(k|up)_proj", "feedforward_modules": r".*up_proj"}),
    ("gpt2", {}),
    ("bert-classes", {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]}),
    ("t5", {}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields"), OURS)
def test_peft_reads_what_we_write(family: str, fields: dict[str, Any], peft_reads: Any) -> None:
    peft_reads(family, al.IA3(**fields), effect=0.001)


@pytest.mark.parametrize(("family", "options"), THEIRS)
def test_we_read_what_peft_writes(family: str, options: dict[str, Any], we_read: Any) -> None:
    we_read(family, peft.IA3Config(**options), "ia3", effect=0.001)
