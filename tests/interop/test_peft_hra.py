"""HRA against HF PEFT, both ways: what one writes the other reads, to the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest

import adapterlab as al

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:fan_in_fan_out is set")

OURS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4}),
    ("qwen2", {"r": 4, "targets": ["q", "down"], "orthogonality": 1e-4}),
    ("bert-classes", {"r": 2, "modules_to_save": ["classifier"]}),
    ("t5", {"r": 2}),
    ("llama", {"r": 3, "gram_schmidt": True, "targets": ["q"]}),
]  # fmt: skip
THEIRS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    ("qwen2", {"r": 6, "target_modules": "all-linear"}),
    ("llama", {"r": 3, "apply_GS": True, "init_weights": False, "target_modules": ["q_proj"]}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields"), OURS)
def test_peft_reads_what_we_write(family: str, fields: dict[str, Any], peft_reads: Any) -> None:
    peft_reads(family, al.HRA(**fields), effect=0.01)


@pytest.mark.parametrize(("family", "options"), THEIRS)
def test_we_read_what_peft_writes(family: str, options: dict[str, Any], we_read: Any) -> None:
    we_read(family, peft.HRAConfig(**options), "hra", effect=0.01)


@pytest.mark.parametrize("method", ["HRA", "RoAd", "MiSS"])
def test_nothing_is_written_for_peft_where_it_has_no_such_layer(method: str, tiny: Any, tmp_path: Path) -> None:
    model, cls = tiny("gpt2"), getattr(al, method)
    host = al.attach(model, cls(**cls.example(model)))
    host.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()
    assert al.load(tiny("gpt2"), tmp_path / "adapter").methods["default"] == host.methods["default"]
