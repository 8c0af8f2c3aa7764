"""Layer freezing: training the last block saves activations, training the first one does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import adapterlab as al


def saved_bytes(method: Any) -> int:
    """Bytes of activations that a forward pass of four blocks keeps for its backward pass."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    )
    al.attach(model, method)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=torch.arange(64)[None] % 16, labels=torch.arange(64)[None] % 16).loss
    loss.backward()
    return sum(kept.values())


@pytest.fixture(scope="module")
def full() -> int:
    return saved_bytes(al.Full())


def test_the_last_block_saves_activations(full: int) -> None:
    assert saved_bytes(al.Freeze(layers=1)) <= 0.40 * full


def test_the_first_block_does_not(full: int) -> None:
    assert saved_bytes(al.Freeze(layers=-1)) >= 0.60 * full


def test_the_claim_fails_when_the_blocks_in_front_stay_trainable(full: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = al.Freeze.attach

    def careless(method: Any, host: Any, name: str) -> None:
        attach(method, host, name)
        for path, parameter in host.model.named_parameters():
            if "layers.0." in path:
                parameter.requires_grad_(True)

    monkeypatch.setattr(al.Freeze, "attach", careless)
    assert saved_bytes(al.Freeze(layers=1)) > 0.40 * full
