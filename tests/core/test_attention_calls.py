"""The bridge into transformers' attention takes its arguments as models give them: in order, or by name."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import adapterlab as al
from adapterlab.data import Collator
from adapterlab.engine.attention import fast_attention
from adapterlab.engine.packing import choose
from adapterlab.errors import ConfigError
from adapterlab.evaluate import evaluate_loss
from adapterlab.registry import method
from adapterlab.testing import models
from adapterlab.train import Training
from adapterlab.train.loop import train


@pytest.mark.parametrize(("fast", "prefix"), [(True, False), (False, True), (True, True)])
def test_names_are_as_good_as_order(fast: bool, prefix: bool) -> None:
    model = models.tiny("llama").eval()
    if prefix:
        al.attach(model, method("prefix_tuning")(length=3))
    module = model.model.layers[0].self_attn
    heads, groups, size = 4, module.k_proj.out_features // module.head_dim, module.head_dim
    q = torch.randn(2, heads, 6, size)[:, : module.q_proj.out_features // size]
    k, v = torch.randn(2, 2, groups, 6, size)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    mask[1, :, 2:, 1] = False
    with fast_attention(model) if fast else contextlib.nullcontext():
        call = ALL_ATTENTION_FUNCTIONS["sdpa"]
        wanted = call(module, q, k, v, mask, scaling=0.3)[0]
        named: dict[str, Any] = {"attention_mask": mask, "scaling": 0.3}
        assert torch.equal(call(module, q, k, v, **named)[0], wanted)
        assert torch.equal(call(module, query=q, key=k, value=v, **named)[0], wanted)
        assert not torch.allclose(call(module, q, k, v, scaling=0.3)[0], wanted)


def _doge() -> Any:
    """A model that names its mask, and computes it from the tokens."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("doge", vocab_size=200, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:  # where it is zero, as in a new model, the mask says nothing
        torch.nn.init.normal_(layer.self_attn.A)
    return model


def test_a_model_that_names_its_mask_trains() -> None:
    model = _doge()
    rows = [{"input_ids": [1, *range(3, 12 + n)], "labels": [1, *range(3, 12 + n)]} for n in range(4)]
    host = al.attach(model, al.LoRA(r=4))
    before = evaluate_loss(model, rows, Collator(0), 4)[0]
    train(host, "default", rows, Training(steps=20, batch_size=4, lr=1e-2))
    assert evaluate_loss(model, rows, Collator(0), 4)[0] < before - 0.5


def test_rows_of_a_model_that_makes_its_own_mask_are_not_packed() -> None:
    model = _doge()
    with pytest.raises(ConfigError, match="makes an attention mask of its own"):
        choose(model, Collator(0), 20, True)
    assert "padded" in choose(model, Collator(0), 20, None)[1]
