"""Subclasses of `nn.Linear` that modelling files bring: some are linear layers, some only look like them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear

import adapterlab as al
from adapterlab.core.site import kind_of
from adapterlab.errors import TargetError

SIZES = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip


def _experts() -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("phimoe", **SIZES))


def test_a_router_that_is_called_linear_is_left_out() -> None:
    model = _experts()
    host = al.attach(model, al.LoRA(r=2))
    assert not any("router" in path for key in host.parts("default") for path in host.adapters(key))
    ids = torch.arange(1, 9)[None]
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in host.parameters("default"))


def test_it_cannot_be_named_either() -> None:
    with pytest.raises(TargetError, match=r"PhimoeTopKRouter \(block\).*linear"):
        al.attach(_experts(), al.LoRA(r=2, targets=["router"]))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_that_computes_what_a_linear_layer_does_is_one(device: str) -> None:
    with torch.device(device):
        assert kind_of(FalconLinear(8, 4)).name == "linear"


def test_subclasses_from_elsewhere_are_believed() -> None:
    class Packed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("was called")

    assert kind_of(Packed(8, 4)).name == "linear"
