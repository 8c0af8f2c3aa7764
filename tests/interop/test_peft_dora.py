"""DoRA against HF PEFT, both ways: what one writes the other reads, to the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adapterlab as al

TOLERANCE = 1e-5
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
def test_peft_reads_what_we_write(
    family: str, fields: dict[str, Any], tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.DoRA(**fields))
    randomise(host, size=0.1)
    expected = logits(model, batch)
    assert (expected - base).abs().max() > 0.01
    host.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
    assert (logits(theirs, batch) - expected).abs().max() < TOLERANCE
    assert torch.equal(logits(al.load(tiny(family), tmp_path / "adapter").model, batch), expected)
    (tmp_path / "adapter" / "method.json").unlink()
    as_peft = al.load(tiny(family), tmp_path / "adapter")
    assert as_peft.methods["default"].id == "dora"
    assert (logits(as_peft.model, batch) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(("family", "options"), THEIRS)
def test_we_read_what_peft_writes(
    family: str, options: dict[str, Any], tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(tiny(family), peft.LoraConfig(**options)).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    model = tiny(family)
    batch = batch_for(model)
    expected = logits(theirs, batch)
    theirs.save_pretrained(tmp_path)
    assert (expected - logits(model, batch)).abs().max() > 0.01
    assert al.load(model, tmp_path).methods["default"].id == "dora"
    assert (logits(model, batch) - expected).abs().max() < TOLERANCE
