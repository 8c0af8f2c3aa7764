"""Rows of tokens, beside LoRA too, and norms against HF PEFT, both ways: to the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adapterlab as al
from adapterlab.errors import FormatError

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:fan_in_fan_out is set")

IDS = [64, 5, 127, 30]
EVERY = list(range(3, 128, 2))
HEADS = {"embed_tokens": EVERY, "lm_head": EVERY}


def tokens(ids: list[int], on: Any = None, **options: Any) -> Any:
    return peft.TrainableTokensConfig(token_indices=ids, target_modules=on, **options)


def lora(ids: Any, on: Any, **options: Any) -> Any:
    return peft.LoraConfig(trainable_token_indices=ids, target_modules=on, **options)


OURS: list[tuple[str, Any]] = [
    *((f, al.TrainableTokens(tokens=EVERY)) for f in ("llama", "llama-tied", "gemma2", "gpt2", "bert-classes", "t5")),
    ("llama", al.TrainableTokens(tokens=EVERY, targets=["embed", "head"])),
    ("llama", al.TrainableTokens(tokens=EVERY, targets=["head"])),
    *((family, al.LoRA(tokens=EVERY, targets=["q", "v"])) for family in ("llama", "llama-tied", "bert-classes", "t5")),
    ("gpt2", al.LoRA(tokens=EVERY, targets=["qkv"])),
    ("llama", al.LoRA(tokens={"embed": EVERY[:9], "head": EVERY}, targets=["q"])),
    ("llama-tied", al.DoRA(tokens=EVERY, targets=["q"])),
    *((family, al.LNTuning()) for family in ("llama", "gemma2", "gpt2", "bert-classes", "t5", "vit")),
    ("qwen2", al.LNTuning(targets={"include": "input_layernorm", "layers": "1"})),
    ("bert-classes", al.LNTuning(modules_to_save=["classifier"])),
]  # fmt: skip
THEIRS: list[tuple[str, Any, str]] = [
    ("llama", tokens(EVERY), "trainable_tokens"),
    ("llama-tied", tokens(EVERY), "trainable_tokens"),
    ("gemma2", tokens(EVERY, init_weights=False), "trainable_tokens"),
    ("gpt2", tokens(EVERY), "trainable_tokens"),
    ("t5", tokens(EVERY), "trainable_tokens"),
    ("llama", tokens(IDS, on=["embed_tokens", "lm_head"]), "trainable_tokens"),
    ("llama", lora(EVERY, on=["q_proj"]), "lora"),
    ("llama-tied", lora(EVERY, on="all-linear"), "lora"),
    ("llama-tied", lora(EVERY, on=["q_proj"], ensure_weight_tying=True), "lora"),
    ("llama-tied", lora(HEADS, on=["q_proj"]), "lora"),
    ("llama", lora(HEADS | {"lm_head": IDS}, on=["q_proj"]), "lora"),
    ("gpt2", lora({"wte": EVERY}, on=["c_attn"], fan_in_fan_out=True), "lora"),
    ("llama-tied", lora(EVERY, on=["q_proj"], use_dora=True), "dora"),
    ("llama", peft.LNTuningConfig(), "ln_tuning"),
    ("gpt2", peft.LNTuningConfig(), "ln_tuning"),
    ("bert-classes", peft.LNTuningConfig(target_modules=["LayerNorm"], modules_to_save=["classifier"]), "ln_tuning"),
    ("t5", peft.LNTuningConfig(target_modules=["layer_norm", "final_layer_norm"]), "ln_tuning"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "method"), OURS)
def test_peft_reads_what_we_write(family: str, method: Any, peft_reads: Any) -> None:
    peft_reads(family, method, effect=0.005)


@pytest.mark.parametrize(("family", "config", "id"), THEIRS)
def test_we_read_what_peft_writes(family: str, config: Any, id: str, we_read: Any) -> None:
    we_read(family, config, id, effect=0.005)


def test_new_tokens_of_peft(tiny: Any, logits: Any, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    model.resize_token_embeddings(130, mean_resizing=False)
    theirs = peft.get_peft_model(model, tokens([128, 129])).eval()
    with torch.no_grad():
        theirs.get_input_embeddings().trainable_tokens_delta["default"].normal_()
    theirs.save_pretrained(tmp_path)
    batch = {"input_ids": torch.tensor([[4, 128, 9, 129]])}
    ours = tiny("llama-tied")
    with pytest.raises(FormatError, match=r"128, 129 lie beyond .*resize_token_embeddings\(130\)"):
        al.load(ours, tmp_path)
    ours.resize_token_embeddings(130, mean_resizing=False)
    al.load(ours, tmp_path)
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), rtol=1e-5, atol=1e-5)


def test_a_bias_that_peft_leaves_out_is_not_exchanged(
    tiny: Any, batch_for: Any, randomise: Any, tmp_path: Path
) -> None:
    """PEFT computes the tied head of BERT without its bias as soon as rows train."""
    model = tiny("bert-masked")
    host = al.attach(model, al.TrainableTokens(tokens=IDS))
    host.save(tmp_path / "ours")
    assert not (tmp_path / "ours" / "adapter_config.json").exists()
    assert al.load(tiny("bert-masked"), tmp_path / "ours").methods["default"] == host.methods["default"]
    for config in (
        tokens(IDS),
        lora(IDS, ["query"]),
    ):
        peft.get_peft_model(tiny("bert-masked"), config).save_pretrained(tmp_path / "theirs")
        with pytest.raises(FormatError, match="whose bias PEFT leaves out"):
            al.load(tiny("bert-masked"), tmp_path / "theirs")


def test_tied_tables_with_different_tokens_are_refused(tiny: Any, tmp_path: Path) -> None:
    """PEFT then trains the two apart, although they are one table."""
    options = {"embed_tokens": [5, 6], "lm_head": [7]}
    config = lora(options, on=["q_proj"])
    peft.get_peft_model(tiny("llama-tied"), config).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="one table, and get different tokens"):
        al.load(tiny("llama-tied"), tmp_path)


def test_rows_beside_lora_train_merge_and_name_their_tokens(
    tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny("llama-tied")
    host = al.attach(model, al.LoRAPlus(tokens=IDS, targets=["q"]))
    host.verify(batch_for(model))
    [rows] = [key for key in host.named_parameters("default") if key.endswith("rows")]
    optimizer = host.methods["default"].optimizer(host, "default", torch.optim.AdamW)
    rates = {id(p): group.get("lr", 0) for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(host.named_parameters("default")[rows])] == 1e-3  # torch's own, and not that of embeddings' factors
    randomise(host)
    live = logits(model, batch_for(model))
    host.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": IDS}
    assert config["target_modules"] == ["q_proj"]
    host.merge()
    torch.testing.assert_close(logits(model, batch_for(model)), live, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
