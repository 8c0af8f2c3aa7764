"""AdaLoRA between HF PEFT and us: pruned, with modules that kept nothing, and PEFT's own algorithm.

PEFT's model computes no loss when it was loaded for inference, so the batches bear no labels there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adapterlab as al

CONFIG: dict[str, Any] = {
    "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 2, "deltaT": 1, "total_step": 8, "lora_alpha": 6,
    "orth_reg_weight": 0.2, "target_modules": ["q_proj", "down_proj"],
    "task_type": "CAUSAL_LM",  # without a task PEFT leaves out the penalty
}  # fmt: skip


def test_we_read_pefts(we_read: Any) -> None:
    we_read("llama", peft.AdaLoraConfig(**{**CONFIG, "lora_alpha": 40}), "adalora", 1e-2)


def trained_by_peft(tiny: Any, batch_for: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Their model after a run, the batch, and the tensors it began with."""
    theirs = peft.get_peft_model(tiny("llama"), peft.AdaLoraConfig(**CONFIG)).train()
    began = {key: p.detach().clone() for key, p in theirs.named_parameters() if p.requires_grad}
    batch = batch_for(theirs.get_base_model())
    optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    for step in range(1, 9):
        theirs(**batch).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return theirs.eval(), batch, began


def test_a_run_of_pefts_is_ours_and_its_pruned_file_loads(
    tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    theirs, batch, began = trained_by_peft(tiny, batch_for)
    shown = {key: value for key, value in batch.items() if key != "labels"}
    wanted = logits(theirs, shown)
    method = al.AdaLoRA(init_r=4, target_r=2, alpha=6, tinit=2, tfinal=2, orth_reg_weight=0.2, targets=["q", "down"])
    host = al.attach(tiny("llama"), method)
    with torch.no_grad():
        for key, value in began.items():
            path, leaf = key.removeprefix("base_model.model.").removesuffix(".default").rsplit(".lora_", 1)
            host.tensors("default")[f"adapter.{path}.{leaf}"].copy_(value)
    host.model.train()
    method.begin(host, "default", 8)
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.02)
    for step in range(8):
        (host.model(**batch).loss + method.penalty(host, "default")).backward()
        optimizer.step()
        method.after_step(host, "default", step, optimizer)
        optimizer.zero_grad()
    assert (logits(host.model, shown) - wanted).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    ranks = {name.removesuffix(".lora_E"): sum(kept) for name, kept in pattern.items()}
    assert len(set(ranks.values())) > 1
    assert {path: int(part.kept.sum()) for path, part in method.layers(host, "default").items()} == ranks
    again = al.load(tiny("llama"), tmp_path)
    assert {path: len(part.A) for path, part in again.methods["default"].layers(again, "default").items()} == ranks
    assert (logits(again.model, shown) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("cut", [False, True])
def test_peft_reads_what_we_pruned(
    cut: bool, tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny("llama")
    batch = batch_for(model)
    labels = batch.pop("labels")
    method = al.AdaLoRA(init_r=4, target_r=2, alpha=40, targets=["q", "down"])
    host = al.attach(model, method)
    randomise(host, size=0.1)
    method.begin(host, "default", 20)
    for i, layer in enumerate(method.layers(host, "default").values()):
        mask = torch.arange(4) % 4 >= i  # 4, 3, 2 and 1 of 4
        layer.settle(mask if i < 3 else torch.zeros(4, dtype=torch.bool))  # and none at all
        with torch.no_grad():
            layer.keep(layer.kept)
    wanted = logits(model, batch)
    if cut:
        method.finish(host, "default")
    host.save(tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert [sum(kept) for kept in config["rank_pattern"].values()] == [4, 3, 2, 0]
    assert (config["tinit"], config["tfinal"], config["total_step"]) == (3, 9, 20)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "a").eval()
    assert (logits(theirs, batch) - wanted).abs().max() < 1e-5
    theirs.save_pretrained(tmp_path / "b")
    assert (logits(al.load(tiny("llama"), tmp_path / "b").model, batch) - wanted).abs().max() < 1e-5
    again = al.load(tiny("llama"), tmp_path / "a")
    again.methods["default"].begin(again, "default", 3)  # what was pruned stays as it is
    again.model.train()
    again.model(**batch, labels=labels).loss.backward()
