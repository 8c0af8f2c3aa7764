"""Tiny random models of every family the tests speak about, and valid batches for them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import parse
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from adapterlab.engine.attention import uses_interface
from selection import pytest_addoption, pytest_collection_modifyitems  # noqa: F401  (hooks)

VOCABULARY, WIDTH, LAYERS = 128, 32, 2
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3,
}  # fmt: skip
BERT = {**ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": 64}

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=False)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=False)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64, n_inner=48,
                   resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    ),
    "bert-classes": lambda: BertForSequenceClassification(BertConfig(**BERT)),
    "bert-tokens": lambda: BertForTokenClassification(BertConfig(**BERT)),
    "bert-masked": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=4,
                 dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**ENCODER, image_size=16, patch_size=8)),
    # These three scale or cap their logits after the head.
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**DECODER, head_dim=8, final_logit_softcapping=1.0)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**DECODER, logits_scaling=4.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**DECODER, logit_scale=0.25)),
}  # fmt: skip

gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same random values whichever tests ran before, so that a bound holds always or never."""
    transformers.set_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    """Before the tests of another file: let the garbage collector pass over whatever is there to stay.

    The libraries are a million objects, which Trainer, the compiler and many allocations have looked through again and
    again: a sixth of the time of all tests.
    """
    gc.collect()
    gc.freeze()


_templates: dict[str, nn.Module] = {}


def make_tiny(kind: str, seed: int = 0) -> Any:
    """A seeded random model in eval mode whose biases and norms are not the trivial ones of a fresh model."""
    torch.manual_seed(seed)
    model = MAKERS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """`tiny("llama")`: a fresh copy of the tiny model of a family; see MAKERS."""

    def copy_of(kind: str) -> Any:
        if kind not in _templates:
            _templates[kind] = make_tiny(kind)
        return copy.deepcopy(_templates[kind])

    return copy_of


@pytest.fixture
def inside_attention() -> Callable[[nn.Module], None]:
    """`inside_attention(model)`: skip where a release older than 5.15 gives this model attention of its own.

    T5 computes attention through the interface of transformers from 5.15 on; before, methods that act inside attention
    refuse it.
    """

    def look(model: nn.Module) -> None:
        if parse(transformers.__version__) < parse("5.15") and type(model).__name__.startswith("T5"):
            assert not any(uses_interface(type(module)) for module in model.modules())
            pytest.skip("T5 computes attention by itself in this release of transformers")

    return look


@pytest.fixture
def batch_for() -> Callable[..., dict[str, Tensor]]:
    """`batch_for(model)`: arguments of the model with labels; padded and partly unlabelled where it takes tokens."""

    def make(model: Any, rows: int = 2, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        name = type(model).__name__
        classes = torch.randint(0, 3, (rows,), generator=draw)
        if name.startswith("ViT"):
            return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=draw), "labels": classes}
        ids = torch.randint(3, VOCABULARY, (rows, length), generator=draw)
        mask = torch.ones_like(ids)
        mask[-1, -2:] = 0
        ids[-1, -2:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if name.endswith("ForSequenceClassification"):
            return {**batch, "labels": classes}
        if name.endswith("ForTokenClassification"):
            return {**batch, "labels": torch.randint(0, 3, (rows, length), generator=draw)}
        labels = torch.randint(3, VOCABULARY, (rows, 6), generator=draw) if name.startswith("T5") else ids.clone()
        labels[:, :2] = -100
        if not name.startswith("T5"):
            labels[mask == 0] = -100
        return {**batch, "labels": labels}

    return make


@pytest.fixture
def randomise() -> Callable[..., None]:
    """`randomise(host)`: give all trained tensors of the adapters values, so that no factor is zero by accident."""

    def fill(host: Any, *names: str, seed: int = 7, size: float = 0.3) -> None:
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name in names or host.methods:
                for value in host.tensors(name).values():
                    noise = torch.randn(value.shape, generator=draw) * size
                    value.add_(noise.to(value.dtype).to(value.device))

    return fill


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the model predicts, without gradients and without labels where it can do without."""
    inputs = batch if "labels" in batch and type(model).__name__.startswith("T5") else dict(batch)
    with torch.no_grad():
        return model(**inputs).logits.clone()


@pytest.fixture
def logits() -> Callable[..., Tensor]:
    """`logits(model, batch)`."""
    return logits_of
