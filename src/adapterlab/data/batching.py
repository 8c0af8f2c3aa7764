"""Batches of token rows, and a look at what in them is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain, groupby
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from adapterlab.data.encoding import IGNORED
from adapterlab.errors import DataError

_STYLES = {"trained": "bold green", "not trained": "dim", "special": "magenta"}


class Collator:
    """Pads token rows on the right to the longest of the batch."""

    def __init__(self, pad_token_id: int, *, seq2seq: bool = False, pad_to_multiple_of: int | None = None) -> None:
        """Set how to pad.

        Args:
            pad_token_id: fills `input_ids`; any id will do, as those positions are neither attended to nor trained.
            seq2seq: whether labels have a length of their own.
            pad_to_multiple_of: round lengths up to a multiple of this.
        """
        self.pad_token_id, self.seq2seq, self.multiple = pad_token_id, seq2seq, pad_to_multiple_of or 1

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Make one batch.

        Args:
            rows: rows of `encode`. Further columns that hold tensors, such as pictures, are stacked over the rows that
                have them.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64 of [batch, time]; for seq2seq labels have their own time;
            and the further columns.

        Raises:
            DataError: the tensors of a further column have not one shape.
        """
        width = max(len(row["input_ids"]) for row in rows)
        label_width = max(len(row["labels"]) for row in rows) if self.seq2seq else width
        return {
            "input_ids": self._padded([row["input_ids"] for row in rows], width, self.pad_token_id),
            "attention_mask": self._padded([[1] * len(row["input_ids"]) for row in rows], width, 0),
            "labels": self._padded([row["labels"] for row in rows], label_width, IGNORED),
            **{key: _stacked(key, rows) for key in _further(rows)},
        }

    def _padded(self, rows: Sequence[Sequence[int]], width: int, filler: int) -> Tensor:
        width = -(-width // self.multiple) * self.multiple
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], dtype=torch.int64)


class PackingCollator:
    """Puts the rows of a batch behind each other, without padding.

    Positions begin at 0 in each row, and the borders of the rows travel along under the names that `transformers`
    knows, so that no token sees another row. Call the model inside `engine.attention.fast_attention`, or with flash
    attention, or with `use_cache=False`: else `transformers` does not look at the borders.
    """

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        """Make one batch.

        Args:
            rows: rows of `encode`.

        Returns:
            `input_ids`, `position_ids` and `labels`, int64 of [1, tokens]; `cu_seq_lens_q` and `cu_seq_lens_k`, int32
            of [rows + 1]; `max_length_q` and `max_length_k`, whole numbers. The first token of a row bears no label:
            nothing predicts it.
        """
        if further := _further(rows):
            raise DataError(
                f"Rows with further columns ({', '.join(further)}) cannot be put behind each other. Set "
                "training.packing to false."
            )
        lengths = [len(row["input_ids"]) for row in rows]
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        longest = max(lengths)
        return {
            "input_ids": self._joined(row["input_ids"] for row in rows),
            "position_ids": self._joined(range(length) for length in lengths),
            "labels": self._joined([IGNORED, *row["labels"][1:]] for row in rows),
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def _joined(self, parts: Iterable[Iterable[int]]) -> Tensor:
        return torch.tensor([[*chain.from_iterable(parts)]], dtype=torch.int64)


def joined(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put batches of a `PackingCollator` behind each other, as if all their rows had been in one."""
    ends = [0, *accumulate(batch["input_ids"].shape[1] for batch in batches)]
    starts = [batch["cu_seq_lens_q"][:-1] + start for batch, start in zip(batches, ends, strict=False)]
    bounds = torch.cat([*starts, batches[-1]["cu_seq_lens_q"][-1:] + ends[-2]])
    longest = max(batch["max_length_q"] for batch in batches)
    return {
        **{key: torch.cat([batch[key] for batch in batches], 1) for key in ("input_ids", "position_ids", "labels")},
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _further(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that hold tensors, beside those of every batch."""
    found = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, Tensor))
    return [key for key in found if key not in ("input_ids", "attention_mask", "labels")]


def _stacked(key: str, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    values = [row[key] for row in rows if key in row]
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) > 1:
        raise DataError(
            f"{key}: the tensors of one batch have the shapes {', '.join(map(str, shapes))}. Bring all rows to one "
            "shape, or give a collator of your own."
        )
    return torch.stack(values)


def placed(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on a device."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def render_sample(row: Mapping[str, Sequence[int]], tokenizer: Any, *, seq2seq: bool = False) -> Text:
    """Show a token row as text, with the trained tokens in bold and a legend in the first line.

    The part below the legend is exactly what the tokenizer decodes; a character split over tokens is shown once, with
    the look of its last token.

    Args:
        row: a row of `encode`.
        tokenizer: the tokenizer it came from.
        seq2seq: whether the labels are a text of their own, shown after the input.

    Returns:
        Text to print with rich.
    """
    shown = Text().append("trained", _STYLES["trained"])
    shown.append(" | ").append("not trained", _STYLES["not trained"])
    shown.append(" | ").append("special token", _STYLES["special"]).append("\n")
    ids, labels = list(row["input_ids"]), list(row["labels"])
    if seq2seq:
        _append(shown, ids, [False] * len(ids), tokenizer)
        shown.append("\n")
        ids, trained = [i for i in labels if i != IGNORED], [i != IGNORED for i in labels if i != IGNORED]
    else:
        trained = [label != IGNORED for label in labels]
    _append(shown, ids, trained, tokenizer)
    return shown


def _append(shown: Text, ids: list[int], trained: list[bool], tokenizer: Any) -> None:
    special = set(tokenizer.all_special_ids)
    whole, done, end = _decoded(ids, tokenizer), 0, 0
    for (learnt, marker), run in groupby((flag, i in special) for flag, i in zip(trained, ids, strict=True)):
        end += len(list(run))
        # An incomplete character at the end of a run belongs to the next one.
        upto = len(whole) if end == len(ids) else len(_decoded(ids[:end], tokenizer).rstrip("\ufffd"))
        style = _STYLES["trained" if learnt else "not trained"] + (f" {_STYLES['special']}" if marker else "")
        shown.append(whole[done:upto], style)
        done = max(done, upto)


def _decoded(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
