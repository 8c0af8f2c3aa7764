"""A tiny model with a tokenizer in a folder."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<e>{% else %}>{% endif %}{% endfor %}"
)


def write_model(folder: Path, more: str = "", **shape: Any) -> Path:
    """A random two-layer Llama over single characters; `more` of them than digits and small letters."""
    specials = ["<p>", "<s>", "<e>", "<u>"]
    letters = [*string.digits, *string.ascii_lowercase, *"+=> ", *more]
    vocabulary = {token: i for i, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<p>", bos_token="<s>", eos_token="<e>", unk_token="<u>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    usual = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    config = LlamaConfig(vocab_size=len(vocabulary), **{**usual, **shape})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
