"""LoRA against HF PEFT, both ways: what one writes the other must read, without a warning, to the same logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adapterlab as al
from adapterlab.errors import FormatError
from adapterlab.io import read_info

TOLERANCE = 1e-5
FAMILIES = ("llama", "llama-tied", "qwen2", "gpt2", "bert-classes", "bert-masked", "t5", "mixtral", "vit")

# id -> (families, our settings); the same rows are written by us and read by PEFT.
OURS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": (FAMILIES, {"r": 4, "alpha": 12}),
    "roles": (("llama", "gpt2", "bert-masked", "t5"), {"r": 3, "targets": {"include": ["o"], "layers": "-1"}}),
    "embeddings": (("llama", "llama-tied", "gpt2", "bert-masked"), {"r": 4, "targets": ["embed", "o"]}),
    "head": (("llama", "llama-tied", "qwen2", "gpt2"), {"r": 4, "targets": ["head", "down"]}),
    "rslora": (("llama", "gpt2"), {"r": 4, "scale": "sqrt"}),
    "patterns": (
        ("llama", "qwen2"),
        {"r": 4, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
         "alpha_pattern": {"self_attn.q_proj": 5, "down_proj": 3}},
    ),
    "patterns-sqrt": (("llama",), {"r": 4, "scale": "sqrt", "rank_pattern": {"v_proj": 2}}),
    "bias-all": (("qwen2", "gpt2", "bert-classes"), {"r": 4, "bias": "all"}),
    "bias-own": (("qwen2", "gpt2", "bert-masked"), {"r": 4, "bias": "lora_only"}),
    "lora-bias": (("qwen2", "gpt2", "llama"), {"r": 4, "lora_bias": True}),
    "dropout": (("llama", "gpt2"), {"r": 4, "dropout": 0.5}),
    "classifier": (("bert-classes",), {"r": 4, "modules_to_save": ["classifier"]}),
    "classifier-bias": (("bert-classes",), {"r": 4, "bias": "all", "modules_to_save": ["classifier"]}),
    "saved-head": (("llama", "llama-tied"), {"r": 4, "modules_to_save": ["lm_head"]}),
    "saved-embedding": (("llama", "llama-tied"), {"r": 4, "modules_to_save": ["embed_tokens"]}),
    "saved-both": (("llama", "llama-tied"), {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}),
}  # fmt: skip
ROWS_OURS = [pytest.param(family, fields, id=f"{case}-{family}") for case, (f, fields) in OURS.items() for family in f]


# PEFT says these about the model, whatever the file holds.
REMARKS = ("tie_word_embeddings", "targeted layer of type Linear has no bias", "fan_in_fan_out is set")


def peft_loads(model: Any, folder: Path) -> Any:
    """Load with PEFT; a warning about the folder (missing or unexpected keys, unknown options) is a failure."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(model, folder).eval()
    said = [str(w.message) for w in seen if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    faults = [text for text in said if not any(remark in text for remark in REMARKS)]
    assert not faults, faults
    return loaded


@pytest.mark.parametrize(("family", "fields"), ROWS_OURS)
def test_peft_reads_what_we_write(
    family: str, fields: dict[str, Any], tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.LoRA(**fields))
    randomise(host, size=0.1)  # larger ones amplify the rounding of a different order of sums
    expected = logits(model, batch)
    assert (expected - base).abs().max() > 0.01  # an adapter that does nothing would agree with anything
    host.save(tmp_path / "adapter")

    theirs = peft_loads(tiny(family), tmp_path / "adapter")
    assert (logits(theirs, batch) - expected).abs().max() < TOLERANCE

    again = al.load(tiny(family), tmp_path / "adapter")
    assert torch.equal(logits(again.model, batch), expected)
    (tmp_path / "adapter" / "method.json").unlink()
    as_peft = al.load(tiny(family), tmp_path / "adapter")
    assert (logits(as_peft.model, batch) - expected).abs().max() < TOLERANCE


LLAMA_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# PEFT's settings; PEFT writes, we read.
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("llama", {}),
    "all-linear": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "qwen2": ("qwen2", {"target_modules": LLAMA_ALL, "task_type": "CAUSAL_LM"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "t5": ("t5", {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
    "vit": ("vit", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "seq-cls": ("bert-classes", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "token-cls": ("bert-tokens", {"target_modules": ["query"], "task_type": "TOKEN_CLS"}),
    "masked": ("bert-masked", {"target_modules": ["query", "dense"]}),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*(q|down)_proj"}),
    "layers": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "layers-pattern": ("llama", {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-tied": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head-tied": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    "head-t5": ("t5", {"target_modules": ["lm_head", "q"]}),
    "both-tied": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "kept-tied": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "saved-kept-tied": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "embedding-gpt2": ("gpt2", {"target_modules": ["wte", "wpe"]}),
    "patterns": (
        "llama",
        {"target_modules": LLAMA_ALL, "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.up_proj": 5},
         "alpha_pattern": {"down_proj": 3}},
    ),
    "patterns-unused": ("llama", {"target_modules": ["q_proj"], "rank_pattern": {"up_proj": 3}}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    "bias-all": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "bias-all-gpt2": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "bias-all-t5": ("t5", {"target_modules": ["q"], "bias": "all"}),
    "bias-all-classifier": ("bert-classes", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "bias-own": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "lora-bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "dropout": ("llama", {"target_modules": ["q_proj"], "lora_dropout": 0.4}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "saved-both": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved-tied": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved-norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
}  # fmt: skip


def trained_by_peft(model: Any, options: dict[str, Any]) -> Any:
    """A PEFT model whose trainable tensors all have random values."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return wrapped.eval()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:fan_in_fan_out is set")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize("case", THEIRS)
def test_we_read_what_peft_writes(case: str, tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> None:
    family, options = THEIRS[case]
    theirs = trained_by_peft(tiny(family), options)
    batch = batch_for(tiny(family))
    expected = logits(theirs, batch)
    theirs.save_pretrained(tmp_path)
    model = tiny(family)
    assert (expected - logits(model, batch)).abs().max() > 0.01
    host = al.load(model, tmp_path)
    assert (logits(model, batch) - expected).abs().max() < TOLERANCE
    host.detach("default")
    assert torch.equal(logits(model, batch), logits(tiny(family), batch))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bert-masked"])  # there `dense` is in the head too
def test_our_config_is_a_valid_peft_config(family: str, tiny: Any, tmp_path: Path) -> None:
    host = al.attach(tiny(family), al.LoRA(r=4, alpha=12, rank_pattern={}, scale="sqrt"))
    host.save(tmp_path / "a", base_model="org/base")
    config = peft.LoraConfig.from_pretrained(tmp_path / "a")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    # What readers other than PEFT (serving engines) look up directly.
    assert written["peft_type"] == "LORA"
    assert written["r"] == config.r == 4
    assert written["lora_alpha"] == config.lora_alpha == 12
    assert written["use_rslora"] is True
    assert written["base_model_name_or_path"] == "org/base"
    assert isinstance(written["target_modules"], list)
    assert isinstance(config.target_modules, set)
    assert written["bias"] == "none"
    assert written["inference_mode"] is True
    # A name per kind of module where that is enough, not a path per layer.
    assert all("." not in name for name in written["target_modules"])
    tasks = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "vit": None, "bert-classes": None}
    if family in tasks:
        assert written["task_type"] == tasks[family]
    if family == "gpt2":
        assert written["fan_in_fan_out"] is True


def test_paths_are_listed_when_names_would_match_more(tiny: Any, tmp_path: Path) -> None:
    host = al.attach(tiny("llama"), al.LoRA(targets={"include": ["q", "v"], "layers": "1"}))
    host.save(tmp_path / "a")
    listed = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert listed == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "layer_replication": {"layer_replication": [[0, 1]]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
}


def foreign(folder: Path, **options: Any) -> Path:
    """A folder whose configuration uses options; there is no need for tensors to refuse it."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"]).to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**config, **options}))
    return folder


@pytest.mark.parametrize("option", UNSUPPORTED)
def test_options_that_change_outputs_are_refused(option: str, tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(FormatError, match=option) as error:
        al.load(model, foreign(tmp_path / "a", **UNSUPPORTED[option]))
    assert "PEFT" in str(error.value)
    assert al.host(model) is None


def test_all_reasons_are_given_at_once(tiny: Any, tmp_path: Path) -> None:
    options = {key: value for row in UNSUPPORTED.values() for key, value in row.items()}
    with pytest.raises(FormatError) as error:
        al.load(tiny("llama"), foreign(tmp_path / "a", **options))
    assert all(option in str(error.value) for option in UNSUPPORTED)
    assert "'pissa'" in str(error.value)


def test_every_option_of_a_default_peft_config_is_known(tmp_path: Path) -> None:
    info = read_info(foreign(tmp_path / "a"))  # a new option with a default that is not empty would be refused
    assert (info.method, info.fields["r"], info.written_by) == ("lora", 4, "peft")


def test_a_resized_vocabulary_is_refused(tiny: Any, tmp_path: Path) -> None:
    bigger = tiny("llama")
    bigger.resize_token_embeddings(130)
    theirs = trained_by_peft(bigger, {"target_modules": ["q_proj"]})
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = tiny("llama")
    with pytest.raises(FormatError, match="resize"):
        al.load(model, tmp_path)
    assert al.host(model) is None


def test_an_unknown_type_names_what_is_known(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(FormatError, match=r"'LORRA'.*LORA"):
        al.load(tiny("llama"), foreign(tmp_path / "a", peft_type="LORRA"))


def test_a_folder_with_pickled_tensors_says_what_to_do(tiny: Any, tmp_path: Path) -> None:
    folder = foreign(tmp_path / "a")
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match="safetensors"):
        al.load(tiny("llama"), folder)
