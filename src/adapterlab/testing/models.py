"""Tiny random models of the families that methods must work on, in every precision, and batches for them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from adapterlab.errors import ConfigError, nearest
from adapterlab.foreign.model import is_encoder_decoder, plain_class
from adapterlab.foreign.private_transformers import kept_in_float32

VOCABULARY, CLASSES = 128, 3
_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Sizes:
    """How wide a tiny model is.

    Attributes:
        width: of the hidden states.
        inner: of the feed-forward networks.
    """

    width: int = 32
    inner: int = 48

    @property
    def layers(self) -> dict[str, Any]:
        """What most configurations call the sizes."""
        return {
            "hidden_size": self.width, "intermediate_size": self.inner, "num_hidden_layers": 2, "num_attention_heads": 4
        }  # fmt: skip

    @property
    def decoder(self) -> dict[str, Any]:
        """Arguments of decoders' configurations."""
        return {**_TOKENS, **self.layers, "num_key_value_heads": 2, "max_position_embeddings": 64}

    @property
    def encoder(self) -> dict[str, Any]:
        """Arguments of encoders' configurations."""
        return {**self.layers, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}

    @property
    def bert(self) -> dict[str, Any]:
        """Arguments of BERT's configuration."""
        return {**self.encoder, "vocab_size": VOCABULARY, "max_position_embeddings": 64}


NARROW, WHOLE_BLOCKS = Sizes(), Sizes(64, 128)  # each row of a weight in 4 bits is whole blocks of 64 in the second

MAKERS: dict[str, Callable[[Sizes], nn.Module]] = {
    "llama": lambda s: LlamaForCausalLM(LlamaConfig(**s.decoder, tie_word_embeddings=True)),
    "llama-1": lambda s: LlamaForCausalLM(
        LlamaConfig(**{**s.decoder, "num_hidden_layers": 1}, tie_word_embeddings=True)
    ),
    "qwen2": lambda s: Qwen2ForCausalLM(Qwen2Config(**s.decoder, tie_word_embeddings=False)),
    "gpt2": lambda s: GPT2LMHeadModel(
        GPT2Config(
            **_TOKENS, n_embd=s.width, n_layer=2, n_head=4, n_positions=64, n_inner=s.inner, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ),
    "bert": lambda s: BertForSequenceClassification(BertConfig(**s.bert)),
    "bert_tokens": lambda s: BertForTokenClassification(BertConfig(**s.bert)),
    "t5": lambda s: T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=s.width, d_kv=s.width // 4, d_ff=s.inner, num_layers=2, num_heads=4,
            dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
        )
    ),
    "mixtral": lambda s: MixtralForCausalLM(
        MixtralConfig(**s.decoder, tie_word_embeddings=False, num_local_experts=4, num_experts_per_tok=2)
    ),
    "mistral-window": lambda s: MistralForCausalLM(MistralConfig(**s.decoder, sliding_window=6)),
    "vit": lambda s: ViTForImageClassification(ViTConfig(**s.encoder, image_size=16, patch_size=8)),
}  # fmt: skip

FAMILIES: tuple[str, ...] = tuple(name for name in MAKERS if "-" not in name)  # the others serve single checks
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKED: tuple[str, ...] = ("nf4", "int8")
PRECISIONS: tuple[str, ...] = (*_DTYPES, *PACKED)


def tiny(family: str = "llama", precision: str = "fp32", seed: int = 0) -> Any:
    """Return a fresh copy of a seeded random model in eval mode, whose biases and norms are not trivial.

    Args:
        family: one of `FAMILIES`; "llama-1" is a Llama of one layer, "mistral-window" sees six tokens back.
        precision: of the base: one of `PRECISIONS`; `nf4` and `int8` pack the linear layers of the backbone with
            bitsandbytes and leave the rest in float32. Models in `nf4` are 64 wide instead of 32.
        seed: of the values.

    Raises:
        ConfigError: family or precision is unknown.
    """
    for what, value, known in (("family", family, tuple(MAKERS)), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise ConfigError(f"There is no tiny model of {what} {value!r}. {nearest(value, known)}")
    return copy.deepcopy(_template(family, precision, seed))


@functools.cache
def _template(family: str, precision: str, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MAKERS[family](WHOLE_BLOCKS if precision == "nf4" else NARROW).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return _pack(model, precision) if precision in PACKED else model.to(_DTYPES[precision])


def _pack(model: Any, precision: str) -> Any:
    """Replace the linear layers of the backbone by packed ones of bitsandbytes."""
    left_out = kept_in_float32(model)  # transformers does not pack these either
    for path, module in list(model.base_model.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if type(module) in (nn.Linear, Conv1D) and leaf not in left_out:
            setattr(model.base_model.get_submodule(parent), leaf, packed(module, precision))
    return model


def packed(linear: nn.Linear | Conv1D, precision: str) -> nn.Module:
    """Return a linear layer with its weight in 4 bits (`nf4`) or 8 bits (`int8`); a `Conv1D` becomes a `Linear`."""
    import bitsandbytes as bnb

    weight = linear.weight.data.T.contiguous() if isinstance(linear, Conv1D) else linear.weight.data
    sizes = tuple(reversed(weight.shape))
    made: Any
    if precision == "nf4":
        made = bnb.nn.Linear4bit(*sizes, bias=linear.bias is not None, compute_dtype=torch.float32, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        made = bnb.nn.Linear8bitLt(*sizes, bias=linear.bias is not None, has_fp16_weights=False, threshold=0.0)
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    made.support_avx512bf16_for_cpu = False  # its layout for inference asks for wider layers
    return made.to(linear.weight.device).train(linear.training)  # moving it packs the weight


def batch(model: Any, rows: int = 2, length: int = 9, seed: int = 1, padding: bool = True) -> dict[str, Tensor]:
    """Return arguments of a tiny model with labels; where it takes tokens, the last row is padded on the right.

    Args:
        model: made by `tiny`, adapted or not.
        rows: number of rows.
        length: tokens of a row.
        seed: of the values.
        padding: whether the last row is shorter than the others.
    """
    draw = torch.Generator().manual_seed(seed)
    kind = plain_class(model).__name__
    classes = torch.randint(0, CLASSES, (rows,), generator=draw)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(rows, 3, 16, 16, generator=draw).to(model.dtype)
        return {"pixel_values": pixels, "labels": classes}
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    if padding:
        mask[-1, -2:] = 0
        ids[-1, -2:] = 0
    tokens = {"input_ids": ids, "attention_mask": mask}
    if kind.endswith("ForSequenceClassification"):
        return {**tokens, "labels": classes}
    if kind.endswith("ForTokenClassification"):
        return {**tokens, "labels": torch.randint(0, CLASSES, (rows, length), generator=draw)}
    if is_encoder_decoder(model):
        return {**tokens, "labels": torch.randint(3, VOCABULARY, (rows, 6), generator=draw)}
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {**tokens, "labels": labels}


def token_rows(count: int = 4, length: int = 9, seed: int = 2) -> list[dict[str, list[int]]]:
    """Return random rows for the training loop; the first two tokens bear no label."""
    draw = torch.Generator().manual_seed(seed)
    made = torch.randint(3, VOCABULARY, (count, length), generator=draw).tolist()
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in made]
