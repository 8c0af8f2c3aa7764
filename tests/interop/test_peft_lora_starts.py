"""Starts and layers of LoRA against HF PEFT: what PEFT starts alike, and every file on the original base."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from torch import nn

import adapterlab as al
from adapterlab.data.batching import Collator, PackingCollator
from adapterlab.engine.attention import fast_attention
from adapterlab.errors import FormatError
from adapterlab.io import read_info

PRESETS = {
    "rslora": {}, "lora_plus": {}, "pissa": {}, "milora": {}, "olora": {}, "eva": {}, "corda": {}, "lora_ga": {},
    "qlora": {"base": "any"},
}  # fmt: skip
CASES = [(id, family) for id in PRESETS for family in ("llama", "gpt2")]


def perturb(host: Any) -> None:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in host.parameters("default"):
            p.add_(torch.randn(p.shape, generator=draw) * 0.05)


@pytest.mark.parametrize(("id", "family"), CASES)
def test_peft_loads_the_file_onto_the_original_base(
    id: str, family: str, tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    method = _make(id)
    host = al.attach(model, method)
    method.prepare(host, "default", [batch])
    perturb(host)
    live = logits(model, batch)
    assert (live - base).abs().max() > 0.01
    host.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "a").eval()
    assert (logits(theirs, batch) - live).abs().max() < 1e-4
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True  # anything else would change the base again
    moved = method.init.moves_base
    assert config["r"] == (8 if moved else config["r"])
    again = al.load(tiny(family), tmp_path / "a")
    assert torch.equal(logits(again.model, batch), live)
    (tmp_path / "a" / "method.json").unlink()
    assert read_info(tmp_path / "a").method == "lora"
    assert (logits(al.load(tiny(family), tmp_path / "a").model, batch) - live).abs().max() < 1e-4


def _make(id: str) -> Any:
    from adapterlab.registry import method

    return method(id)(r=4, **PRESETS[id])


def test_ranks_and_scales_of_modules_survive_the_conversion(
    tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny("llama")
    batch = batch_for(model)
    patterns = {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 3}}
    host = al.attach(model, al.PiSSA(r=4, scale="sqrt", **patterns))
    perturb(host)
    live = logits(model, batch)
    host.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "a").eval()
    assert (logits(theirs, batch) - live).abs().max() < 1e-4
    assert torch.equal(logits(al.load(tiny("llama"), tmp_path / "a").model, batch), live)


@pytest.mark.parametrize(("ours", "theirs", "family"), [
    ("pissa", "pissa", "llama"), ("pissa", "pissa", "gpt2"), ("olora", "olora", "llama"),
])  # fmt: skip
def test_factors_and_base_start_as_in_peft(ours: str, theirs: str, family: str, tiny: Any) -> None:
    model, other = tiny(family), tiny(family)
    host = al.attach(model, al.LoRA(r=4, alpha=6, init=ours, targets=["o", "down"]))
    names = {path.rpartition(".")[2] for path in host.adapters("default")}
    options = {"target_modules": sorted(names), "init_lora_weights": theirs, "fan_in_fan_out": family == "gpt2"}
    wrapped = peft.get_peft_model(other, peft.LoraConfig(r=4, lora_alpha=6, **options))
    for path, layer in host.adapters("default").items():
        module = wrapped.base_model.model.get_submodule(path)
        product = module.lora_B["default"].weight @ module.lora_A["default"].weight
        assert torch.allclose(layer.B @ layer.A, product, atol=1e-4)
        assert torch.allclose(layer.site.module.weight, module.base_layer.weight, atol=1e-4)


@pytest.mark.parametrize(("family", "mode", "packed"), [
    ("llama", "ipm", False), ("llama", "ipm", True), ("llama", "kpm", False), ("gpt2", "ipm", False),
])  # fmt: skip
def test_corda_decomposes_in_the_basis_that_peft_finds(
    family: str, mode: str, packed: bool, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts bear no label and rows are padded here; PEFT is given whole rows, one by one."""
    # PEFT's file takes its decorator from a package that PEFT does not depend on.
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 128, (n,), generator=draw).tolist() for n in (24, 30, 17, 21)]
    data = [{"input_ids": row, "labels": [-100] * (len(row) - 3) + row[-3:]} for row in rows]
    collate = PackingCollator() if packed else Collator(0)
    model, other = tiny(family), tiny(family)
    method = al.LoRA(r=4, alpha=6, init={"name": "corda", "mode": mode}, targets=["o", "down"])
    host = al.attach(model, method)
    with fast_attention(model):
        method.prepare(host, "default", [collate(data[:2]), collate(data[2:])])
    names = sorted({path.rpartition(".")[2] for path in host.adapters("default")})
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=names, init_lora_weights="corda", fan_in_fan_out=family == "gpt2",
        corda_config=CordaConfig(corda_method=mode),
    )  # fmt: skip
    preprocess_corda(other, config, lambda: [other(torch.tensor([row])) for row in rows])
    wrapped = peft.get_peft_model(other, config)
    for path, layer in host.adapters("default").items():
        module = wrapped.base_model.model.get_submodule(path)
        a, b = (factor["default"].weight.detach() for factor in (module.lora_A, module.lora_B))
        assert torch.allclose(layer.B @ layer.A, b @ a, atol=1e-3 * float((b @ a).abs().max()))
        assert abs(float(layer.B.norm() / b.norm()) - 1) < 1e-3
        assert abs(float(layer.A.norm() / a.norm()) - 1) < 1e-3


def test_fused_blocks_become_one_update_of_more_rank(tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> None:
    model = tiny("gpt2")
    batch = batch_for(model)
    host = al.attach(model, al.LoRA(r=2, alpha=6, targets=["qkv"], blocks=(32, 32, 32), enable=(True, False, True)))
    perturb(host)
    live = logits(model, batch)
    host.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    theirs = peft.PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "a").eval()
    assert (logits(theirs, batch) - live).abs().max() < 1e-5


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, **options)
        self.line = nn.Conv1d(6, 5, 3, stride=2)

    def forward(self, x: Any) -> Any:
        return self.line(self.conv(x).flatten(2))


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options).eval()


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_convolutions_have_pefts_layout(init: str, tmp_path: Path) -> None:
    model, x = net(), torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    host = al.attach(model, al.LoRA(r=2, targets=["conv", "line"], lora_bias=True, init=init))
    perturb(host)
    live = model(x)
    host.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "a").eval()
    rounding = 1e-5 * float(live.abs().max())  # a start that moves the base is taken out of it and put back
    assert (theirs(x) - live).abs().max() < rounding
    found = al.load(net(), tmp_path / "a").model(x)
    assert torch.equal(found, live) if init == "kaiming" else (found - live).abs().max() < rounding
    theirs.save_pretrained(tmp_path / "b")
    assert (al.load(net(), tmp_path / "b").model(x) - live).abs().max() < rounding


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}])
def test_convolutions_that_peft_computes_otherwise(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = net(**options), torch.randn(2, 4, 6, 6)
    host = al.attach(model, al.LoRA(r=2, targets=["conv"]))
    perturb(host)
    live = model(x)
    host.save(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    assert torch.equal(al.load(net(**options), tmp_path / "a").model(x), live)
    theirs = peft.get_peft_model(net(**options), peft.LoraConfig(r=2, target_modules=["conv"]))
    theirs.save_pretrained(tmp_path / "b")
    with pytest.raises(FormatError, match=r"conv has groups, a dilation or a padding"):
        al.load(net(**options), tmp_path / "b")
