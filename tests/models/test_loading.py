from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from adapterlab.errors import ConfigError, ModelError
from adapterlab.models import load_model


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_folder_loads_in_each_precision(tiny_llama, precision, dtype):
    model, _ = load_model(tiny_llama, precision=precision, device="cpu")
    assert {p.dtype for p in model.parameters()} == {dtype}
    saved = load_file(tiny_llama / "model.safetensors")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, saved["model.layers.1.mlp.up_proj.weight"].to(dtype))
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_padding_falls_back_to_the_end_token(tiny_llama):
    _, tokenizer = load_model(tiny_llama, device="cpu")
    assert tokenizer.pad_token == "<end>"
    assert tokenizer(["a b c", "d"], padding=True).input_ids == [[2, 3, 4], [5, 1, 1]]


def test_the_model_remembers_its_name_and_saves(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_llama.parent)
    model, _ = load_model("./llama", device="cpu")
    assert model.name_or_path == model.config._name_or_path == str(tiny_llama)
    model.save_pretrained(tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_attention_kernel_is_passed_on(tiny_llama):
    model, _ = load_model(tiny_llama, device="cpu", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_an_encoder_decoder_loads_as_one(tiny_llama, tmp_path):
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, device="cpu")
    assert isinstance(model, T5ForConditionalGeneration)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "bf61"}, r"precision='bf61' is unknown. Nearest: bf16"),
        ({"quantize": "fp4"}, r"quantize='fp4' is unknown. Nearest: nf4"),
        ({"device": "tpu9"}, r"device='tpu9' is unknown.*cpu"),
    ],
)
def test_unknown_settings_are_named(tiny_llama, settings, said):
    with pytest.raises(ConfigError, match=said):
        load_model(tiny_llama, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(tiny_llama):
    with pytest.raises(ConfigError, match="device='cuda' is not there"):
        load_model(tiny_llama, device="cuda")


def test_missing_weights_are_an_error(tiny_llama):
    weights = load_file(tiny_llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tiny_llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tiny_llama, device="cpu")


def test_weights_of_another_shape_are_an_error(tiny_llama):
    config = json.loads((tiny_llama / "config.json").read_text())
    (tiny_llama / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(ModelError, match=r"keys of another shape: model\.layers\.0\.mlp"):
        load_model(tiny_llama, device="cpu")


def test_damaged_weights_are_an_error(tiny_llama):
    content = (tiny_llama / "model.safetensors").read_bytes()
    (tiny_llama / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tiny_llama, device="cpu")


def test_a_model_without_tokenizer_is_refused(tiny_llama):
    (tiny_llama / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer.*tokenizer\.save_pretrained"):
        load_model(tiny_llama)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(("quantize", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_quantized_bases_answer_nearly_as_the_dense_one(tiny_llama, quantize, kind):
    dense, _ = load_model(tiny_llama, precision="fp32", device="cpu")
    model, _ = load_model(tiny_llama, precision="fp32", quantize=quantize, device="cpu")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == kind
    tokens = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, atol=0.05, rtol=0.1)
