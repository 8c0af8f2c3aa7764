"""From examples to what a given model takes: token rows within its window and vocabulary, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapterlab.data import Collator, DataConfig, Encoded, Example, encode
from adapterlab.data.vocabulary import check_ids, filler
from adapterlab.evaluate.generation import window_of
from adapterlab.foreign.model import is_encoder_decoder


def rows_for(model: Any, tokenizer: Any, examples: Sequence[Example], cfg: DataConfig) -> Encoded:
    """Turn examples into token rows for a model.

    Args:
        model: of transformers.
        tokenizer: its tokenizer.
        examples: of one format.
        cfg: the data settings.

    Raises:
        DataError: a row cannot be used (see `encode`), or has a token that the model does not know.
    """
    seq2seq, window = is_encoder_decoder(model), window_of(model, tokenizer)
    encoded = encode(examples, tokenizer, cfg, window=window, seq2seq=seq2seq)
    check_ids(model, encoded.rows, tokenizer, [examples[i].row for i in encoded.kept])
    return encoded


def collator_for(model: Any, tokenizer: Any) -> Collator:
    """Return what pads a model's token rows."""
    return Collator(filler(model, tokenizer), seq2seq=is_encoder_decoder(model))
