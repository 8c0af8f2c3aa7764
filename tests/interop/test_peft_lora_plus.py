"""The optimizer's groups of LoRA+ against those that HF PEFT makes for the same adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

import adapterlab as al
from adapterlab.testing.case import optimizer


def groups(found: torch.optim.Optimizer) -> list[tuple[float, float, int]]:
    """(rate, weight decay, number of values) of each group."""
    return sorted(
        (round(g["lr"], 9), g["weight_decay"], sum(p.numel() for p in g["params"])) for g in found.param_groups
    )


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_groups_are_pefts(tiny: Any, tmp_path: Path) -> None:
    host = al.attach(tiny("qwen2"), al.LoRAPlus(r=4, ratio=16, bias="lora_only", targets=["q", "v", "embed"]))
    host.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("qwen2"), tmp_path, is_trainable=True)
    made = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_lr_embedding=1e-6, loraplus_weight_decay=0.1
    )
    assert groups(optimizer(host, "default", lr=1e-3, weight_decay=0.1)) == groups(made)
    assert len(made.param_groups) == 4
