"""VeRA and RandLoRA against HF PEFT, both ways, with saved bases and with bases drawn from the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adapterlab as al

TOLERANCE = 1e-4
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:fan_in_fan_out is set"),
    pytest.mark.filterwarnings("ignore:Specified to not"),
]

VERA: dict[str, Any] = {"r": 6, "seed": 3, "d_initial": 0.2}
RANDLORA: dict[str, Any] = {"r": 5, "seed": 3, "alpha": 10.0}
OURS: list[tuple[str, Any, dict[str, Any]]] = [
    ("llama", al.VeRA, {**VERA, "save_projection": True}),
    ("llama", al.VeRA, {**VERA, "save_projection": False, "targets": ["q", "k", "down"]}),
    ("gpt2", al.VeRA, VERA),
    ("bert-classes", al.VeRA, {**VERA, "modules_to_save": ["classifier"]}),
    ("llama", al.RandLoRA, {**RANDLORA, "save_projection": True}),
    ("llama", al.RandLoRA, {**RANDLORA, "targets": ["q", "k", "down"]}),
    ("gpt2", al.RandLoRA, RANDLORA),
    ("llama", al.RandLoRA, {**RANDLORA, "sparse": True, "targets": ["up"]}),
    ("llama", al.RandLoRA, {**RANDLORA, "very_sparse": True}),
]  # fmt: skip
THEIRS: list[tuple[str, Any]] = [
    ("vera", peft.VeraConfig(r=4, projection_prng_key=7, target_modules=["q_proj", "k_proj", "down_proj"])),
    ("vera", peft.VeraConfig(r=4, projection_prng_key=7, save_projection=False, target_modules="all-linear")),
    (
        "randlora",
        peft.RandLoraConfig(r=4, projection_prng_key=7, randlora_alpha=8, target_modules=["k_proj", "up_proj"]),
    ),
    ("randlora", peft.RandLoraConfig(r=6, randlora_alpha=8, save_projection=False, target_modules="all-linear")),
]


@pytest.mark.parametrize(("family", "cls", "fields"), OURS)
def test_peft_reads_what_we_write(
    family: str, cls: Any, fields: dict[str, Any], tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, cls(**fields))
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in host.parameters("default"):
            p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    expected = logits(model, batch)
    assert (expected - base).abs().max() > 0.01
    host.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
    assert (logits(theirs, batch) - expected).abs().max() < TOLERANCE
    assert torch.equal(logits(al.load(tiny(family), tmp_path / "adapter").model, batch), expected)
    (tmp_path / "adapter" / "method.json").unlink()
    as_peft = al.load(tiny(family), tmp_path / "adapter")
    assert as_peft.methods["default"].id == host.methods["default"].id
    assert (logits(as_peft.model, batch) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(("id", "config"), THEIRS)
def test_we_read_what_peft_writes(id: str, config: Any, tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny("llama"), config).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    model = tiny("llama")
    batch = batch_for(model)
    expected = logits(theirs, batch)
    theirs.save_pretrained(tmp_path)
    assert (expected - logits(model, batch)).abs().max() > 0.01
    assert al.load(model, tmp_path).methods["default"].id == id
    assert (logits(model, batch) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(("cls", "fields"), [(al.VeRA, VERA), (al.RandLoRA, RANDLORA)])
def test_saved_bases_stand_above_the_seed(
    cls: Any, fields: dict[str, Any], tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny("llama")
    batch = batch_for(model)
    host = al.attach(model, cls(**fields, save_projection=True))
    randomise(host, size=0.1)  # the bases too: no seed gives these
    expected = logits(model, batch)
    host.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "method.json").unlink()
    assert (logits(al.load(tiny("llama"), tmp_path / "adapter").model, batch) - expected).abs().max() < TOLERANCE
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter").eval()
    assert (logits(theirs, batch) - expected).abs().max() < TOLERANCE
