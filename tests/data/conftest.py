from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from templates_chatml import PLAIN_CHATML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from adapterlab.data import Example

CORPUS = [
    "user\nHow many apples are there? There are 12 apples.\n",
    "\n\n\n\n" * 20,
    "assistant\nThe answer is 42, naïve café 你好 🙂.\nsystem\nBe brief.",
]


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A byte-level BPE tokenizer, trained on two sentences, with the template given."""

    def make(
        template: str | None = PLAIN_CHATML, *, trim_offsets: bool = False, bos: bool = False
    ) -> PreTrainedTokenizerFast:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
        core.decoder = decoders.ByteLevel()
        special = ["<|im_start|>", "<|im_end|>", "<s>", "<pad>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        core.train_from_iterator(CORPUS, trainer)
        if trim_offsets:
            core.post_processor = processors.ByteLevel(trim_offsets=True)
        if bos:
            core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            eos_token="<|im_end|>",
            pad_token="<pad>",
            bos_token="<s>",
            extra_special_tokens=["<|im_start|>"],
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def chat() -> Callable[..., Example]:
    def make(*turns: str, system: str | None = None, row: int = 1) -> Example:
        messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
        head = [{"role": "system", "content": system}] if system else []
        return Example(messages=(*head, *messages), answer=turns[-1], row=row)

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return str(path)

    return write
