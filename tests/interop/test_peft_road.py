"""RoAd against HF PEFT: the same outputs from the same file, in both directions."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, RoadConfig, get_peft_model

import adapterlab as al
from adapterlab.methods.multiplicative.road import RoAd

IDS = torch.tensor([[5, 9, 2, 40], [7, 7, 30, 1]])


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_peft_adapters_load_with_equal_outputs(tiny, tmp_path, variant):
    config = RoadConfig(variant=variant, group_size=8, target_modules=["q_proj", "down_proj"], init_weights=False)
    theirs = get_peft_model(tiny("llama"), config).eval()
    theirs.save_pretrained(tmp_path)
    model = tiny("llama")
    host = al.load(model, tmp_path)
    assert host.methods["default"].variant == variant
    assert torch.allclose(model(IDS).logits, theirs(IDS).logits, atol=1e-5)
    assert not torch.allclose(model(IDS).logits, tiny("llama")(IDS).logits, atol=1e-2)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_our_adapters_load_in_peft(tiny, tmp_path, randomise, variant):
    model = tiny("llama")
    host = al.attach(model, RoAd(variant=variant, group_size=16, targets=["q", "v", "up"]))
    randomise(host)
    host.save(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter").eval()
    assert torch.allclose(theirs(IDS).logits, model(IDS).logits, atol=1e-5)
