"""Merging into a folder: transformers loads it, and it computes what the live model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterlab as al
from adapterlab.convert import merge_into_base
from adapterlab.convert import merging as module
from adapterlab.convert.verifying import compare, token_rows
from adapterlab.errors import ConfigError, DataError, MergeError, OutputError

IDS = torch.arange(5, 30)[None]


def live(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "method",
    [
        al.LoRA(r=2, targets=["q", "v"], modules_to_save=["norm"]),
        al.DoRA(r=2, targets=["o", "down"]),
        al.IA3(targets=["k", "down"]),
        al.Full(),
    ],
    ids=lambda m: m.id,
)
def test_the_folder_computes_the_same(base, put, tokenizer, tmp_path, method) -> None:
    host = put(base(), method, size=0.05)
    before, plain = live(host.model), live(base())
    made = merge_into_base(host, tokenizer, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(live(loaded), before, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("abc")["input_ids"] == tokenizer("abc")["input_ids"]
    assert torch.equal(live(host.model), before)  # the host is as it was
    host.detach("a")
    assert torch.equal(live(host.model), plain)
    found = json.loads((tmp_path / "m" / "merge.json").read_text())["verification"]
    assert found["agreement"] == made.verification.agreement == 1.0
    assert found["max_difference"] < 1e-4 < found["effect"]
    assert found["perplexity_merged"] == pytest.approx(found["perplexity_live"], rel=1e-4)
    assert not [name for name in load_file(tmp_path / "m" / "model.safetensors") if "adapter" in name]


@pytest.mark.parametrize("kind", ["gpt2", "t5", "mixtral", "bert-classes", "vit", "qwen2"])
def test_every_family(tiny, put, batch_for, tmp_path, kind) -> None:
    model = tiny(kind)
    host = put(model, al.LoRA(r=2, targets="all-linear"))
    rows = [{key: value[0] for key, value in batch_for(model).items() if kind in ("t5", "gpt2") or key != "labels"}]
    found = merge_into_base(host, None, tmp_path / "m", samples=rows).verification
    assert found.max_difference < 1e-4 < found.effect
    assert (found.perplexity_live is None) == (kind not in ("t5", "gpt2"))


@pytest.mark.parametrize("targets", [["q", "embed"], ["q", "head"]])
def test_a_tied_head_is_untied_and_the_config_says_so(base, put, tokenizer, tmp_path, targets) -> None:
    host = put(base(tie_word_embeddings=True), al.LoRA(r=2, targets=targets))
    before = live(host.model)
    with pytest.raises(MergeError, match="tied"):
        merge_into_base(host, tokenizer, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert not list(tmp_path.iterdir())
    assert merge_into_base(host, tokenizer, tmp_path / "m", tied="untie").untied
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    torch.testing.assert_close(live(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), before, atol=1e-4, rtol=1e-4)
    assert host.model.config.tie_word_embeddings is True
    assert host.model.lm_head.weight is host.model.model.embed_tokens.weight


def test_a_tied_head_that_is_not_adapted_stays_tied(base, put, tokenizer, tmp_path) -> None:
    host = put(base(tie_word_embeddings=True), al.LoRA(r=2, targets=["q"]))
    assert not merge_into_base(host, tokenizer, tmp_path / "m", tied="untie").untied
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")


@pytest.fixture(params=["nf4", "int8"])
def packed(request, base, folder_of, put) -> Any:
    pytest.importorskip("bitsandbytes")
    folder = folder_of(base(hidden_size=64, intermediate_size=128))
    model, _ = al.load_model(folder, precision="fp32", device="cpu", quantize=request.param)
    return put(model, al.LoRA(r=2, targets=["q", "v"]), size=0.3)


def test_a_packed_base(packed, tokenizer, tmp_path) -> None:
    before = live(packed.model)
    with pytest.raises(MergeError, match="packed"):
        merge_into_base(packed, tokenizer, tmp_path / "m")
    plain = merge_into_base(packed, tokenizer, tmp_path / "m", quantized="dequantize")
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert all(v.is_floating_point() for v in load_file(tmp_path / "m" / "model.safetensors").values())
    assert (live(loaded) - before).abs().mean() < 0.2 * plain.verification.effect
    again = merge_into_base(packed, tokenizer, tmp_path / "m", quantized="requantize", overwrite=True)
    assert "quantization_config" in json.loads((tmp_path / "m" / "config.json").read_text())
    assert again.dequantized is not None
    assert again.dequantized.mean_difference == pytest.approx(plain.verification.mean_difference, rel=1e-3)
    assert again.verification.mean_difference > again.dequantized.mean_difference
    assert any(v.dtype in (torch.uint8, torch.int8) for v in load_file(tmp_path / "m" / "model.safetensors").values())
    assert torch.equal(live(packed.model), before)


def test_nothing_is_overwritten_or_left_behind(base, put, tokenizer, tmp_path, monkeypatch) -> None:
    host, made = put(base(), al.LoRA(r=2)), tmp_path / "m"
    merge_into_base(host, tokenizer, made)
    before = {file.name: file.read_bytes() for file in made.iterdir()}
    with pytest.raises(OutputError, match="not empty"):
        merge_into_base(host, tokenizer, made)
    (made / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"something else \(mine\.txt\)"):
        merge_into_base(host, tokenizer, made, overwrite=True)
    (made / "mine.txt").unlink()
    monkeypatch.setattr(module, "_reload", lambda *_: base(seed=5))  # what was written computes something else
    with pytest.raises(MergeError, match="merging loses what it does"):
        merge_into_base(host, tokenizer, made, overwrite=True)
    assert {file.name: file.read_bytes() for file in made.iterdir()} == before
    assert list(tmp_path.iterdir()) == [made]
    monkeypatch.undo()
    merge_into_base(host, tokenizer, made, overwrite=True)
    assert {file.name for file in made.iterdir()} == before.keys()


def test_an_update_that_vanishes_in_bfloat16_is_refused(base, put, tokenizer, tmp_path) -> None:
    model = base()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.1).add_(1)  # the update adds up over the inputs; the weight cancels
        weight = model.model.layers[0].self_attn.v_proj.weight
        weight[:, ::2], weight[:, 1::2] = 12, -12
    host = put(model.bfloat16(), al.LoRA(r=1, alpha=1, targets=[r".*layers\.0\..*v_proj"]), size=0.0)
    with torch.no_grad():
        for value in host.tensors("a").values():
            value.fill_(0.03**0.5)  # ΔW = 0.03 everywhere; half a step of bfloat16 at 12 is 0.031
    with pytest.raises(MergeError, match=r"merging loses what it does.*bfloat16.*--dtype fp32"):
        merge_into_base(host, tokenizer, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    model.float()
    found = merge_into_base(host, tokenizer, tmp_path / "m").verification
    assert found.mean_difference < 0.01 * found.effect  # the positions' frequencies stay rounded in the live model


def test_figures_against_their_definition(base, put, tokenizer) -> None:
    host, other = put(base(), al.LoRA(r=2)), base(seed=3)
    texts = ["a first text", "and another, longer one"]
    found = compare(host, other, token_rows(texts, tokenizer, host.model))
    ours, theirs, plain, nll = [], [], [], []
    for text in texts:
        ids = torch.tensor(tokenizer(text)["input_ids"])[None]
        with torch.no_grad():
            ours.append(host.model(ids).logits[0])
            theirs.append(other(ids).logits[0])
            plain.append(base()(ids).logits[0])
        nll.append(torch.nn.functional.cross_entropy(ours[-1][:-1], ids[0, 1:], reduction="none"))
    ours, theirs, plain = torch.cat(ours), torch.cat(theirs), torch.cat(plain)
    assert found.tokens == len(ours)
    assert found.max_difference == pytest.approx(float((ours - theirs).abs().max()), rel=1e-5)
    assert found.mean_difference == pytest.approx(float((ours - theirs).abs().mean()), rel=1e-5)
    assert found.effect == pytest.approx(float((ours - plain).abs().mean()), rel=1e-5)
    assert found.spread == pytest.approx(float(ours.std(correction=0)), rel=1e-4)
    assert found.agreement == pytest.approx(float((ours.argmax(1) == theirs.argmax(1)).float().mean()))
    assert found.perplexity_live == pytest.approx(float(torch.cat(nll).mean().exp()), rel=1e-5)


def test_bad_input(base, put, tokenizer, tmp_path) -> None:
    host = put(base(), al.LoRA(r=2))
    with pytest.raises(ConfigError, match="quantized='pack'"):
        merge_into_base(host, tokenizer, tmp_path / "m", quantized="pack")
    with pytest.raises(ConfigError, match="no samples"):
        merge_into_base(host, tokenizer, tmp_path / "m", samples=[])
    with pytest.raises(DataError, match="two tokens"):
        merge_into_base(host, tokenizer, tmp_path / "m", samples=["a"])
    with pytest.raises(ConfigError, match="need a tokenizer"):
        merge_into_base(host, None, tmp_path / "m")
    host.attach(al.AdapterPfeiffer(), "p")
    with pytest.raises(MergeError, match="cannot be merged"):
        merge_into_base(host, tokenizer, tmp_path / "m", "p")
    assert not list(Path(tmp_path).iterdir())
    assert host.active == ("a", "p")
