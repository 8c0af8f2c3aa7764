"""HRA against HF PEFT, both ways: what one writes the other reads, to the same logits."""

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
def test_peft_reads_what_we_write(
    family: str, fields: dict[str, Any], tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.HRA(**fields))
    randomise(host, size=0.1)
    expected = logits(model, batch)
    assert (expected - base).abs().max() > 0.01
    host.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
    assert (logits(theirs, batch) - expected).abs().max() < TOLERANCE
    assert torch.equal(logits(al.load(tiny(family), tmp_path / "adapter").model, batch), expected)
    (tmp_path / "adapter" / "method.json").unlink()
    as_peft = al.load(tiny(family), tmp_path / "adapter")
    assert as_peft.methods["default"].id == "hra"
    assert (logits(as_peft.model, batch) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(("family", "options"), THEIRS)
def test_we_read_what_peft_writes(
    family: str, options: dict[str, Any], tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(tiny(family), peft.HRAConfig(**options)).eval()
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
    assert al.load(model, tmp_path).methods["default"].id == "hra"
    assert (logits(model, batch) - expected).abs().max() < TOLERANCE
