"""Batches of token rows, and a look at what in them is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain, groupby, pairwise
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from adapterlab.data.encoding import IGNORED
from adapterlab.errors import DataError
from adapterlab.foreign.calls import PLACES

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
            **{key: _stacked(key, rows) for key in further_columns(rows)},
        }

    def _padded(self, rows: Sequence[Sequence[int]], width: int, filler: int) -> Tensor:
        width = -(-width // self.multiple) * self.multiple
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], dtype=torch.int64)


class PackingCollator:
    """Puts the rows of a batch behind each other, without padding.

    Positions begin at 0 in each row, and the borders of the rows travel along under the names that `transformers`
    knows, so that no token sees another row. Call the model inside `engine.attention.fast_attention`, or with flash
    attention, or with `use_cache=False`: else `transformers` does not look at the borders.

    Rows may share their opening: tokens that several begin with (a system prompt, the instruction of a task) stand in
    the batch once, as a sample of their own, and the rest of each row sees them in front of it. In a causal model the
    vectors there depend on no later token, so loss and gradients are the same, and what the opening would cost in the
    other rows is saved ("Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward", arXiv 2506.05433, does
    it for the answers of one prompt). Such a batch is for `fast_attention` alone.

    Attributes:
        share: whether rows share their opening where that saves enough.
    """

    def __init__(self, *, share: bool = False) -> None:
        self.share = share

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        """Make one batch.

        Args:
            rows: rows of `encode`.

        Returns:
            `input_ids`, `position_ids` and `labels`, int64 of [1, tokens]; `cu_seq_lens_q` and `cu_seq_lens_k`, int32
            of [samples + 1], borders among tokens and among the keys that they see; `max_length_q` and `max_length_k`,
            whole numbers; and with shared openings `key_places`, int64 of [keys]: which token's key stands there. The
            first token of a sample bears no label: nothing in it predicts it.
        """
        if further := further_columns(rows):
            raise DataError(
                f"Rows with further columns ({', '.join(further)}) cannot be put behind each other. Set "
                "training.packing to false."
            )
        if self.share and (openings := _openings(rows)):
            return _branching(rows, openings)
        return _packed([(row, 0) for row in rows])


def joined(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put batches of a `PackingCollator` behind each other, as if all their rows had been in one."""
    together = {key: torch.cat([batch[key] for batch in batches], 1) for key in ("input_ids", "position_ids", "labels")}
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        ends = [0, *accumulate(int(batch[key][-1]) for batch in batches)]
        starts = [batch[key][:-1] + start for batch, start in zip(batches, ends, strict=False)]
        together[key] = torch.cat([*starts, batches[-1][key][-1:] + ends[-2]])
    longest = {key: max(batch[key] for batch in batches) for key in ("max_length_q", "max_length_k")}
    if any(PLACES in batch for batch in batches):
        ends = [0, *accumulate(batch["input_ids"].shape[1] for batch in batches)]
        together[PLACES] = torch.cat([_places(batch) + start for batch, start in zip(batches, ends, strict=False)])
    return {**together, **longest}


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Number of tokens of the rows of a batch, padding not counted; a shared opening counts in each row."""
    if (places := batch.get(PLACES)) is not None:
        seen: Tensor = places.bincount()
        return len(places) - int((seen > 1).sum())  # an opening by itself is no row
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else int(batch["input_ids"].numel())


def _packed(parts: Sequence[tuple[Mapping[str, Sequence[int]], int]]) -> dict[str, Any]:
    """Rows behind each other, each from a token on; what is left out must be seen by `key_places`."""
    lengths = [len(row["input_ids"]) - start for row, start in parts]
    bounds = _bounds(lengths)
    return {
        "input_ids": _joined(row["input_ids"][start:] for row, start in parts),
        "position_ids": _joined(range(start, len(row["input_ids"])) for row, start in parts),
        "labels": _joined([IGNORED, *row["labels"][start + 1 :]] for row, start in parts),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


_Rows = Sequence[Mapping[str, Sequence[int]]]
_LEAST, _WORTH = 8, 0.1  # tokens of an opening, and share of a batch's tokens to be saved, from which on it is shared


def _openings(rows: _Rows) -> list[tuple[int, list[int]]]:
    """The openings to share: their length, and which rows have them; [] where that saves too little.

    An opening ends before the token that predicts the first label of a row, which is the row's own.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if _bare(row) >= _LEAST:
            alike.setdefault(tuple(row["input_ids"][:_LEAST]), []).append(i)
    found = [(_common([rows[i] for i in numbers]), numbers) for numbers in alike.values() if len(numbers) > 1]
    saved = sum(length * (len(numbers) - 1) for length, numbers in found)
    return found if saved >= _WORTH * sum(len(row["input_ids"]) for row in rows) else []


def _common(rows: _Rows) -> int:
    """How many tokens rows have in common that another may have for them: the first and the last of them tell."""
    parts = [list(row["input_ids"][: _bare(row)]) for row in rows]
    least, most = min(parts), max(parts)
    return next((i for i, (one, other) in enumerate(zip(least, most, strict=False)) if one != other), len(least))


def _bare(row: Mapping[str, Sequence[int]]) -> int:
    """How many tokens of a row another may have for it: those before the one that predicts its first label."""
    first = next((i for i, label in enumerate(row["labels"]) if i and label != IGNORED), len(row["input_ids"]))
    return first - 1


def _branching(rows: _Rows, openings: Sequence[tuple[int, list[int]]]) -> dict[str, Any]:
    """The packed batch of rows of which some share their opening; each opening stands before the first of its rows."""
    opened = {i: (length, numbers[0]) for length, numbers in openings for i in numbers}
    parts: list[tuple[Mapping[str, Sequence[int]], int]] = []  # as for `_packed`
    behind: list[int | None] = []  # the opening that each continues, by its number among the parts
    at: dict[int, int] = {}  # where the openings are, by the first of their rows
    for i, row in enumerate(rows):
        length, first = opened.get(i, (0, -1))
        if first == i:
            at[i] = len(parts)
            parts.append(({"input_ids": row["input_ids"][:length], "labels": [IGNORED] * length}, 0))
            behind.append(None)
        parts.append((row, length))
        behind.append(at.get(first))
    packed = _packed(parts)
    own = [range(start, end) for start, end in pairwise(packed["cu_seq_lens_q"].tolist())]
    seen = [[*(() if number is None else own[number]), *tokens] for number, tokens in zip(behind, own, strict=True)]
    widths = [len(keys) for keys in seen]
    return {**packed, "cu_seq_lens_k": _bounds(widths), "max_length_k": max(widths), PLACES: _joined(seen)[0]}


def _places(batch: Mapping[str, Any]) -> Tensor:
    """The places of the keys of a batch, its tokens' own where none are shared."""
    found: Tensor | None = batch.get(PLACES)
    ids: Tensor = batch["input_ids"]
    return torch.arange(ids.shape[1], device=ids.device) if found is None else found


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _joined(parts: Iterable[Iterable[int]]) -> Tensor:
    return torch.tensor([[*chain.from_iterable(parts)]], dtype=torch.int64)


def further_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns that hold tensors, beside those of every batch."""
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
