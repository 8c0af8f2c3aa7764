from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import adapterlab as al


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def make_base(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(make_tokenizer()), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def noise(host: Any, name: str, seed: int, size: float = 0.2) -> None:
    """Give the adapter's tensors values."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in host.tensors(name).values():
            value.add_(torch.randn(value.shape, generator=draw) * size)


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def base() -> Callable[..., Any]:
    """`base(tie_word_embeddings=True)`: a tiny random Llama for the byte tokenizer."""
    return make_base


@pytest.fixture
def put() -> Callable[..., Any]:
    """`put(model, method, name, seed)`: attach with random values, switched on."""

    def attach(model: Any, method: Any, name: str = "a", seed: int = 1, size: float = 0.2) -> Any:
        host = al.attach(model, method, name)
        noise(host, name, seed, size)
        return host

    return attach


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., Path]:
    """`folder_of(model, "base")`: a model folder with a tokenizer."""

    def write(model: Any, name: str = "base") -> Path:
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def saved_adapter(tmp_path: Path) -> Callable[..., Path]:
    """`saved_adapter(base_folder, method, "north", seed)`: an adapter folder."""

    def write(base_folder: Path, method: Any, name: str, seed: int) -> Path:
        model, _ = al.load_model(base_folder, precision="fp32", device="cpu")
        host = al.attach(model, method, name)
        noise(host, name, seed)
        return host.save(tmp_path / name)

    return write


@pytest.fixture
def weights_of() -> Callable[..., dict[str, Tensor]]:
    """`weights_of(host, "a")`: every base parameter in float64 after merging, by path; the host is left as it was."""

    def read(host: Any, *names: str, **options: Any) -> dict[str, Tensor]:
        with host.using(*names):
            for name in names:
                host.merge(name, **options)
            state = host.model.state_dict()
            found = {k: v.double().clone() for k, v in state.items() if not host.is_adapter_path(k)}
            for name in reversed(names):
                host.restore(name)
        return found

    return read
