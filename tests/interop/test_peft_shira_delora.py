"""SHiRA and DeLoRA against HF PEFT, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import adapterlab as al

OURS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "SHiRA", {"r": 4}),
    ("qwen2", "SHiRA", {"r": 2, "mask": "magnitude", "scale": 0.5, "targets": ["q", "down"]}),
    ("bert-classes", "SHiRA", {"r": 3, "mask": "structured", "modules_to_save": ["classifier"]}),
    ("llama", "DeLoRA", {"r": 4}),
    ("qwen2", "DeLoRA", {"r": 2, "start": "zero", "rank_pattern": {"down_proj": 5}, "targets": ["q", "down"]}),
    ("t5", "DeLoRA", {"r": 3, "rank_pattern": {"wo": 5}, "strength_pattern": {"q": 2.0}}),
    ("bert-classes", "DeLoRA", {"r": 3, "modules_to_save": ["classifier"]}),
]  # fmt: skip
THEIRS: list[tuple[str, str, Any]] = [
    ("llama", "shira", peft.ShiraConfig(r=4, target_modules=["q_proj", "down_proj"])),
    ("qwen2", "shira", peft.ShiraConfig(r=2, random_seed=7, init_weights=False, target_modules=["v_proj"])),
    ("llama", "delora", peft.DeloraConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False)),
    (
        "qwen2", "delora",
        peft.DeloraConfig(
            r=4, rank_pattern={"v_proj": 2}, lambda_pattern={"v_proj": 3}, target_modules=["q_proj", "v_proj"]
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "method", "fields"), OURS)
def test_peft_reads_what_we_write(family: str, method: str, fields: dict[str, Any], peft_reads: Any) -> None:
    peft_reads(family, getattr(al, method)(**fields), effect=0.01)


@pytest.mark.parametrize(("family", "id", "config"), THEIRS)
def test_we_read_what_peft_writes(family: str, id: str, config: Any, we_read: Any) -> None:
    we_read(family, config, id, effect=0.01)


def test_masks_of_ones_own_function_are_read(tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> None:
    """PEFT takes a function for the mask, which no file can name: the places in the file count."""
    config = peft.ShiraConfig(r=2, mask_type="corner", target_modules=["q_proj"], init_weights=False)
    config.mask_fn = lambda layer, r, **more: (torch.arange(32 * 32).view(32, 32) < 2 * 64).float()
    theirs = peft.get_peft_model(tiny("llama"), config).eval()
    theirs.save_pretrained(tmp_path)
    model = tiny("llama")
    batch = batch_for(model)
    host = al.load(model, tmp_path)
    assert (logits(model, batch) - logits(theirs, batch)).abs().max() < 1e-5
    assert all(layer.indices[0].max() == 3 for layer in host.adapters("default").values())


def test_a_seed_alone_never_decides(tiny: Any, tmp_path: Path, randomise: Any) -> None:
    """Places are saved with the values, so that no random generator has to give them again."""
    host = al.attach(tiny("llama"), al.SHiRA(r=2, targets=["q"]))
    randomise(host)
    host.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in tensors} == {"shira_weight", "shira_indices"}
    assert {value.dtype for key, value in tensors.items() if key.endswith("indices")} == {torch.int32}
