"""Facts about foreign models come from their structure: stacks of layers, what is called, whose weight is only read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.mamba.modeling_mamba import MambaMixer

import adapterlab as al
from adapterlab.errors import AttachError, TargetError
from adapterlab.foreign.calls import calls
from adapterlab.foreign.model import backbone_of, main_stacks, stacks, text_config


@pytest.fixture(scope="module")
def uneven() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_decoder_layers=2, num_heads=4)
    )


def q_layers(model: Any, layers: str) -> list[str]:
    host = al.attach(model, al.LoRA(r=2, targets={"include": ["q"], "layers": layers}))
    found = [".".join(path.split(".")[:3:2]) for path in host.adapters("default")]
    host.detach("default")
    return list(dict.fromkeys(found))


def test_stacks_of_different_depth_are_each_counted_by_themselves(uneven: Any) -> None:
    assert q_layers(uneven, "-1") == ["encoder.3", "decoder.1"]
    assert q_layers(uneven, "0-1") == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    assert q_layers(uneven, "encoder: 2-3, decoder: 0") == ["encoder.2", "encoder.3", "decoder.0"]
    with pytest.raises(TargetError, match=r"0-3 is not within the layers 0-1 of decoder.*stacks differ.*'decoder"):
        q_layers(uneven, "0-3")
    with pytest.raises(TargetError, match=r"no stack of layers is called 'vision'"):
        q_layers(uneven, "vision: 0")


def test_the_language_models_layers_are_those_of_its_tower() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = CLIPModel(
        CLIPConfig(
            text_config={**sizes, "num_hidden_layers": 2, "vocab_size": 64},
            vision_config={**sizes, "num_hidden_layers": 5, "image_size": 16, "patch_size": 8},
        )
    )
    assert sorted(len(stack) for stack in stacks(model).values()) == [2, 5]
    assert [len(stack) for stack in main_stacks(model)] == [2]
    assert text_config(model) is model.config.text_config
    assert text_config(LlamaConfig()).num_hidden_layers == LlamaConfig().num_hidden_layers


def test_the_backbone_is_what_the_head_calls() -> None:
    config = OPTConfig(
        vocab_size=128, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OPTForCausalLM(config).eval()
    assert backbone_of(model) is model.model.decoder
    ids = torch.randint(4, 118, (2, 7))
    before = model(input_ids=ids).logits
    host = al.attach(model, al.PromptTuning(length=5))
    assert not torch.equal(model(input_ids=ids).logits, before)
    host.verify({"input_ids": ids, "labels": ids})


def test_a_module_whose_weight_is_read_without_a_call_is_no_target() -> None:
    if "dt_proj" in calls(MambaMixer).called:
        pytest.skip("this release of transformers calls dt_proj, save in its kernels for CUDA")
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8)).eval()
    with pytest.raises(AttachError, match=r"dt_proj: MambaMixer reads its weight and never calls it"):
        al.attach(model, al.LoRA(r=4, targets=["dt_proj"]))
    host = al.attach(model, al.LoRA(r=4))
    assert not any("dt_proj" in path for path in host.adapters("default"))
    with torch.no_grad():
        for p in host.parameters("default"):
            p.add_(0.3 * torch.randn_like(p))
    ids = torch.randint(0, 128, (1, 9))
    live = model(input_ids=ids).logits
    host.merge()
    assert (model(input_ids=ids).logits - live).abs().max() < 1e-3


def test_adapters_inside_torchs_encoder_act_in_eval_mode_too() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    encoder, x = nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 32)
    host = al.attach(encoder, al.LoRA(r=4, targets=["linear1", "linear2"]))
    with torch.no_grad():
        for p in host.parameters("default"):
            p.normal_(0, 0.1)
        trained, answered = encoder.train()(x), encoder.eval()(x)
        assert (trained - answered).abs().max() < 1e-5
        with host.using():
            assert (encoder(x) - answered).abs().max() > 0.01
    with pytest.raises(AttachError, match=r"out_proj: (MultiheadAttention|TransformerEncoderLayer) reads its weight"):
        host.attach(al.LoRA(r=2, targets=["out_proj"]), "other")
    host.detach("default")
    assert not any(module._forward_pre_hooks for module in encoder.modules())


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.asked = (nn.Linear(2, 2) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.called(x.to(self.called.weight.dtype))
        return self.inner(y) if isinstance(self.asked.weight, torch.Tensor) else y

    def inner(self, y: torch.Tensor) -> torch.Tensor:
        return y @ self.read.weight


def test_asking_a_weight_for_facts_is_no_reading() -> None:
    found = calls(Asks)
    assert found.read == {"read"}
    assert {"called", "inner"} <= found.called
