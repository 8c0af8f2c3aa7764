"""Variants of LoRA that HF PEFT reads as LoRA: saved so, or written as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer

import adapterlab as al
from adapterlab.convert import export_lora
from adapterlab.optim import adamw

TOLERANCE = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:fan_in_fan_out is set")

EXPORTED: list[tuple[str, dict[str, Any], int]] = [
    ("delta_lora", {"r": 2}, 4),
    ("lora_xs", {"r": 3}, 3),
    ("dylora", {"r": 4, "inference_rank": 2}, 2),
    ("lora_dropout", {"r": 3, "p": 0.4}, 3),
    ("lora_drop", {"r": 2, "steps": 1, "share": 1.0, "threshold": 0.3}, 2),
    ("vera", {"r": 5}, 5),
]


@pytest.mark.parametrize(("id", "fields", "rank"), EXPORTED)
def test_peft_reads_the_exported_lora(
    id: str, fields: dict[str, Any], rank: int, tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny("llama")
    batch = batch_for(model)
    host = al.attach(model, al.method(id)(targets=["q", "down"], **fields))
    host.methods["default"].prepare(host, "default", [batch])
    randomise(host, "default")
    expected = logits(model, batch)
    made = export_lora(host, "default", into="exported")
    assert set(made.ranks.values()) == {rank}
    with host.using("exported"):
        assert (logits(model, batch) - expected).abs().max() < TOLERANCE
    host.save(tmp_path / "adapter", "exported")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter").eval()
    assert (logits(theirs, batch) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_reads_lora_fa_as_lora(
    family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    host = al.attach(model, al.LoRAFA(r=3))
    randomise(host)
    expected = logits(model, batch)
    host.save(tmp_path / "adapter")
    assert torch.equal(logits(al.load(tiny(family), tmp_path / "adapter").model, batch), expected)
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
    assert (logits(theirs, batch) - expected).abs().max() < TOLERANCE


def test_the_projected_optimizer_steps_as_pefts(tiny: Any, batch_for: Any, tmp_path: Path) -> None:
    method = al.LoRAFA(r=3, alpha=6, projected=True, targets=["q", "v"])
    host = al.attach(tiny("llama"), method)
    torch.manual_seed(0)
    for layer in host.adapters("default").values():
        torch.nn.init.normal_(layer.B, std=0.1)
    host.save(tmp_path / "adapter")
    theirs: Any = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter", is_trainable=True)
    steps = (
        method.optimizer(host, "default", lambda p: adamw(p, lr=1e-2, weight_decay=0.0)),
        create_lorafa_optimizer(theirs, r=3, lora_alpha=6, lr=1e-2),
    )
    batch = batch_for(host.model)
    before = [layer.B.detach().clone() for layer in host.adapters("default").values()]
    for model, optimizer in zip((host.model, theirs), steps, strict=True):
        for _ in range(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    found = [layer.B for layer in host.adapters("default").values()]
    wanted = [p for n, p in theirs.named_parameters() if "lora_B" in n]
    for ours, other, start in zip(found, wanted, before, strict=True):
        # PEFT rounds the product to bfloat16 and adds a larger epsilon.
        assert (ours - other).norm() < 0.1 * (ours - start).norm()
