"""Token ids and the tables that they choose rows of: an id beyond its table is found before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterlab.data.encoding import IGNORED
from adapterlab.errors import DataError
from adapterlab.foreign.model import vocabulary

Tables = tuple[int | None, int | None]  # rows of the embedding and of the output; None: not known


def check_ids(
    model: Any, rows: Sequence[Mapping[str, Sequence[int]]], tokenizer: Any = None, numbers: Sequence[int] = ()
) -> None:
    """Refuse token rows that a model has no embedding, or no output, for.

    Args:
        model: of transformers.
        rows: with `input_ids` and perhaps `labels`.
        tokenizer: to tell the token by its text.
        numbers: of the rows in their source; by default their place.

    Raises:
        DataError: an id lies outside of its table; the message names row and token.
    """
    check_within(vocabulary(model), rows, tokenizer, numbers)


def check_within(
    tables: Tables, rows: Sequence[Mapping[str, Sequence[int]]], tokenizer: Any = None, numbers: Sequence[int] = ()
) -> None:
    """Refuse token rows that tables of these sizes have no row for; see `check_ids`."""
    read, written = tables
    for place, row in enumerate(rows):
        for ids, size, table in ((row["input_ids"], read, "embedding"), (row.get("labels", ()), written, "output")):
            if size is None or not ids or (max(ids) < size and min(ids) >= IGNORED):
                continue
            wrong = next(i for i in ids if not IGNORED <= i < size)
            token = "" if tokenizer is None else f", {tokenizer.convert_ids_to_tokens(wrong)!r}"
            raise DataError(
                f"Row {numbers[place] if numbers else place + 1} has the token {wrong}{token}, but the model's {table} "
                f"has {size:,} rows: the tokenizer is not this model's, or tokens were added to it. Use the model's "
                "own tokenizer, or resize the model (model.resize_token_embeddings) and save it first."
            )


def covers(tables: Tables, tokenizer: Any) -> bool:
    """Say whether tables have a row for whatever a tokenizer may make."""
    most = max(tokenizer.get_vocab().values(), default=0)
    return all(size is None or most < size for size in tables)


def filler(model: Any, tokenizer: Any) -> int:
    """Return an id to fill rows with: the padding token, or another one where the model has no row for it.

    What is filled in is neither attended to nor trained, so any id that the model has will do.
    """
    pad, size = tokenizer.pad_token_id, vocabulary(model)[0]
    return pad if pad is not None and (size is None or pad < size) else 0
