from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, T5Config

import adapterlab as al
from adapterlab.cli import main
from adapterlab.hosts import Host


def run(capsys: Any, *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["targets", *map(str, args)])
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The configuration alone: there are no weights to load."""
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_json_agrees_with_the_real_model(capsys: Any, llama: Path) -> None:
    code, out, _ = run(capsys, llama, "--json")
    assert code == 0
    found = json.loads(out)
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(llama))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    expected = {s.path: s for s in Host(model).all_sites() if s.path and list(s.module.parameters())}
    assert {m["path"] for m in found["modules"]} == set(expected)
    for module in found["modules"]:
        site = expected[module["path"]]
        assert module["parameters"] == sum(p.numel() for p in site.module.parameters())
        assert (module["kind"], module["role"], module["tied"]) == (site.kind, site.role, site.tied)
        assert module["shape"] == (list(site.shape) if site.kind in ("linear", "embedding") else None)
    host = al.attach(model, al.LoRA(r=1))
    assert found["all-linear"]["modules"] == len(host.adapters("default")) == 35
    assert found["roles"]["k"] == {"modules": 5, "parameters": 5 * 16 * 32, "shapes": [[16, 32]]}
    assert found["roles"]["head"]["modules"] == 1


def test_equal_layers_are_shown_once(capsys: Any, llama: Path) -> None:
    _, out, _ = run(capsys, llama)
    assert "layers.0-4 (5x)" in out
    assert out.count("q_proj") == 2  # in the tree, and as an example of an entry
    assert "[16, 32]" in out
    assert "input_layernorm" in out
    assert "post_attention_layernorm" in out
    assert "all-linear" in out


def test_other_families(capsys: Any, tmp_path: Path) -> None:
    GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4).save_pretrained(tmp_path / "gpt2")
    found = json.loads(run(capsys, tmp_path / "gpt2", "--json")[1])
    assert found["roles"]["qkv"]["shapes"] == [[96, 32]]  # `Conv1D` stores [in, out]
    T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4).save_pretrained(tmp_path / "t5")
    _, out, _ = run(capsys, tmp_path / "t5")
    assert "decoder" in out
    # The first block alone holds the position biases, so it is not folded with the second.
    assert "block.0 " in out


def test_an_adapter_folder_shows_its_base(capsys: Any, llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(llama))
    al.attach(model, al.LoRA(r=1)).save(tmp_path / "adapter", base_model=str(llama))
    assert run(capsys, tmp_path / "adapter", "--json")[1] == run(capsys, llama, "--json")[1]


def test_bad_input(capsys: Any, tmp_path: Path) -> None:
    code, _, err = run(capsys, "smolm2")
    assert code == 2
    assert "Nearest: smollm2" in err
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    code, _, err = run(capsys, tmp_path)
    assert code == 2
    assert "cannot be used" in err
    assert "nonsense" in err
