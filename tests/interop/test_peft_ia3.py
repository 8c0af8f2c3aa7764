"""IA3 against HF PEFT, both ways: what one writes the other reads, to the same logits."""

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
def test_peft_reads_what_we_write(
    family: str, fields: dict[str, Any], tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.IA3(**fields))
    randomise(host, size=0.1)
    expected = logits(model, batch)
    assert (expected - base).abs().max() > 0.001
    host.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
    assert (logits(theirs, batch) - expected).abs().max() < TOLERANCE
    assert torch.equal(logits(al.load(tiny(family), tmp_path / "adapter").model, batch), expected)
    (tmp_path / "adapter" / "method.json").unlink()
    as_peft = al.load(tiny(family), tmp_path / "adapter")
    assert as_peft.methods["default"].id == "ia3"
    assert (logits(as_peft.model, batch) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(("family", "options"), THEIRS)
def test_we_read_what_peft_writes(
    family: str, options: dict[str, Any], tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(tiny(family), peft.IA3Config(**options)).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    model = tiny(family)
    batch = batch_for(model)
    expected = logits(theirs, batch)
    theirs.save_pretrained(tmp_path)
    assert (expected - logits(model, batch)).abs().max() > 0.001
    assert al.load(model, tmp_path).methods["default"].id == "ia3"
    assert (logits(model, batch) - expected).abs().max() < TOLERANCE
