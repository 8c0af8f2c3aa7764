from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import adapterlab as al
from adapterlab.data import DataConfig
from adapterlab.hosts import Host

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, ChatML as template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens={"start": "<|im_start|>"},
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def make_model(tokenizer: Any, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama that writes letters only, so that its answers are plain text."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "attention_dropout": 0.5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
    letters = torch.tensor(tokenizer.convert_tokens_to_ids(list(string.ascii_lowercase)))
    silent = torch.ones(len(tokenizer), dtype=torch.bool)
    silent[letters] = False
    with torch.no_grad():
        model.lm_head.weight[silent] = 0
    return model


def attach_strong(model: Any, seed: int, targets: Sequence[str] = ("q", "v", "down")) -> Host:
    """Attach a LoRA adapter whose factors change every answer."""
    host = al.attach(model, al.LoRA(r=2, targets=targets))
    generator = torch.Generator().manual_seed(seed)
    for parameter in host.parameters("default"):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return host


@pytest.fixture
def adapted() -> Callable[..., Host]:
    """`adapted(model, seed)`: attach a random adapter that shows."""
    return attach_strong


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return make_model(tokenizer)


@pytest.fixture
def base_folder(tmp_path: Path, model: Any, tokenizer: Any) -> Path:
    folder = tmp_path / "base"
    attached = al.host(model)
    (attached.save_base if attached else model.save_pretrained)(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int) -> Path:
    model, _ = al.load_model(base, precision="fp32", device="cpu")
    return attach_strong(model, seed).save(folder)


@pytest.fixture
def adapter(base_folder: Path, tmp_path: Path) -> Path:
    return save_adapter(base_folder, tmp_path / "north", seed=1)


@pytest.fixture
def other_adapter(base_folder: Path, tmp_path: Path) -> Path:
    return save_adapter(base_folder, tmp_path / "south", seed=2)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Six question-answer rows of different lengths."""
    file = tmp_path / "rows.jsonl"
    pairs = [{"question": "what is " + "very " * i + f"n{i}?", "answer": "abc" * (i + 1)} for i in range(6)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file


@pytest.fixture
def run_folder(tmp_path: Path, base_folder: Path, rows: Path) -> Path:
    """A run folder as training leaves it, with adapters best/ and last/."""
    data = DataConfig(path=str(rows), eval_path=str(rows), scorer="exact")
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"model": str(base_folder), "precision": "fp32", "quantize": None, "data": data.model_dump(mode="json")}
    (folder / "run.json").write_text(json.dumps({"config": config}))
    save_adapter(base_folder, folder / "best", seed=1)
    save_adapter(base_folder, folder / "last", seed=2)
    return folder
