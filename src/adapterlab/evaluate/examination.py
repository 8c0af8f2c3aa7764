"""The one examination: the same rows, loss and answers for whoever asks how good a model is."""

from __future__ import annotations

import dataclasses
import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from adapterlab.data import (
    DataConfig,
    Example,
    Scorer,
    load_data,
    placed,
    prompt_of,
    scorer_for,
    wilson,
)
from adapterlab.data.batching import further_columns
from adapterlab.data.encoding import IGNORED
from adapterlab.data.formats import Columns
from adapterlab.data.mixture import Named
from adapterlab.data.turns import texts_in
from adapterlab.data.views import Picked
from adapterlab.engine.attention import fast_attention
from adapterlab.engine.modes import evaluating
from adapterlab.engine.packing import choose
from adapterlab.errors import ConfigError, DataError
from adapterlab.evaluate.generation import generate, window_of
from adapterlab.evaluate.lengths import by_length
from adapterlab.evaluate.progress import Progress, counter
from adapterlab.evaluate.rows import collator_for, rows_for
from adapterlab.foreign.model import input_device, is_encoder_decoder, plain_class

Row = Mapping[str, Sequence[int]]

_SHORTEST = 64  # tokens an answer may have at least, so that a model that explains itself is not cut off at once


@dataclass(frozen=True)
class Paper:
    """What every model is asked, the same for all.

    Attributes:
        examples: evaluation examples.
        rows: their tokens and labels.
        prompts: tokens up to the answer: of all examples with a scorer, of the first few without.
        scorer: None where answers are not scored.
        why: the reason when they are not, else "".
        max_new_tokens: longest answer; 0 where none is asked for.
        batch_size: examples computed at once.
        source: where the examples come from.
        left_out: number of examples that leave no room for an answer within the longest row; nobody is asked those.
        columns: which columns of the rows became examples, and which parts of turns the template does not show.
        sources: the numbers of the examples of each source, by its name, where there are several.
    """

    examples: Sequence[Example]
    rows: Sequence[dict[str, list[int]]]
    prompts: list[list[int]]
    scorer: Scorer | None
    why: str
    max_new_tokens: int
    batch_size: int
    source: str
    left_out: int
    columns: Columns = field(default_factory=Columns)
    sources: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sheet:
    """What one model made of a paper.

    Attributes:
        losses: summed cross-entropy of each row, in nats.
        tokens: labelled tokens of each row.
        answers: to the paper's prompts.
        right: whether each is; empty without a scorer.
    """

    losses: list[float]
    tokens: list[int]
    answers: list[str]
    right: list[bool]

    @property
    def loss(self) -> float:
        """Mean cross-entropy of the labelled tokens of all rows, in nats; NaN where there are none."""
        return sum(self.losses) / sum(self.tokens) if any(self.tokens) else math.nan

    @property
    def score(self) -> float | None:
        """Share of right answers; None where they are not scored."""
        return sum(self.right) / len(self.right) if self.right else None

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of the score."""
        return wilson(sum(self.right), len(self.right)) if self.right else None

    def part(self, numbers: Sequence[int]) -> Sheet:
        """Return what the model made of some of the examples."""
        scored = numbers if self.right else ()
        return Sheet(
            [self.losses[i] for i in numbers], [self.tokens[i] for i in numbers],
            [self.answers[i] for i in scored], [self.right[i] for i in scored],
        )  # fmt: skip


def set_paper(
    data: DataConfig,
    model: Any,
    tokenizer: Any,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    samples: int = 0,
) -> Paper:
    """Prepare the examination of a model.

    Args:
        data: where the evaluation examples come from, and how answers are scored.
        model: to be examined.
        tokenizer: its tokenizer.
        limit: use the first n examples only.
        batch_size: examples computed at once.
        max_new_tokens: longest answer; default: twice the longest reference, and at least 64 tokens.
        samples: how many answers to ask for where they cannot be scored, for reading alone.

    Raises:
        ConfigError: the limit is below 1.
        DataError: there are no evaluation examples, or none that leaves room for an answer.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be 1 or more; received {limit}. Leave it out to use all examples.")
    splits = load_data(data)
    examples = splits.eval[:limit]
    if not examples:
        raise DataError(
            f"There are no evaluation examples in {splits.eval_source}. Set data.eval_path, data.eval_split or a "
            "data.eval_size above 0."
        )
    scorer = scorer_for(data, dataclasses.replace(splits, eval=examples))
    seq2seq, window = is_encoder_decoder(model), window_of(model, tokenizer)
    encoded = rows_for(model, tokenizer, examples, data)
    if len(encoded.kept) < len(examples):
        examples = Picked(examples, encoded.kept)
    asked = examples if scorer else [e for e in examples[:samples] if e.messages]
    prompts = [prompt_of(e, tokenizer, data, seq2seq=seq2seq) for e in asked]
    tokens = _answer_limit(asked, tokenizer, prompts, None if seq2seq else window, max_new_tokens) if asked else 0
    why = "" if scorer else _why(data, examples)
    return Paper(
        examples, encoded.rows, prompts, scorer, why, tokens, batch_size, splits.eval_source, encoded.report.dropped,
        splits.columns.joined(Columns(unused=encoded.report.unshown)), _sources(splits.eval, encoded.kept),
    )  # fmt: skip


def _sources(examples: Sequence[Example], kept: Sequence[int]) -> dict[str, list[int]]:
    """The numbers of the kept examples of each source; {} where there is one source."""
    if not isinstance(examples, Named) or len(examples.names) < 2:
        return {}
    ends = [*accumulate(map(len, examples.parts))]
    found: dict[str, list[int]] = {}
    for number, place in enumerate(kept):
        found.setdefault(examples.names[bisect_right(ends, place)], []).append(number)
    return found


def _why(data: DataConfig, examples: Sequence[Example]) -> str:
    if data.scorer == "none":
        return "data.scorer is none"
    if examples[0].messages is None:
        return "plain text has no prompt to answer"
    if any(e.answer is None for e in examples):
        return "some answers call tools, which are not compared"
    return "the reference answers are long free text, for which only the loss tells"


def _answer_limit(
    examples: Sequence[Example], tokenizer: Any, prompts: Sequence[list[int]], window: int | None, asked: int | None
) -> int:
    """Longest answer in tokens: as asked, else room for twice the longest reference."""
    if asked is not None:
        return asked
    texts = ["\n".join(texts_in(e.messages[-1])) for e in examples if e.messages]  # what is thought first counts, too
    needed = max(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]) + 1
    wanted = max(_SHORTEST, 2 * needed)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    room = wanted if window is None else window - len(prompts[longest])
    if room < needed:
        raise DataError(
            f"The prompt of evaluation row {examples[longest].row} has {len(prompts[longest])} of the {window} tokens "
            f"of the model's window, which leaves {max(room, 0)} for an answer; the longest reference has {needed}. "
            "Shorten or remove the row, or set max_new_tokens lower."
        )
    return min(wanted, room)


def sit(paper: Paper, model: Any, tokenizer: Any, progress: Progress | None = None, prefix: str = "") -> Sheet:
    """Let a model take the examination as it stands.

    Args:
        paper: what is asked.
        model: with the adapters that are live.
        tokenizer: its tokenizer.
        progress: called with what is being done, how many examples are done, and their number.
        prefix: of what is being done.

    Raises:
        DataError: no token bears a label.
    """
    count = len(paper.examples)
    losses, tokens = row_losses(
        model, paper.rows, tokenizer, paper.batch_size, counter(progress, prefix + "loss", count) if progress else None
    )
    if not sum(tokens):
        raise DataError(
            f"None of the {count} evaluation rows has a token with a label, so there is no loss. "
            "Check data.train_on and data.max_length."
        )
    if not paper.prompts:
        return Sheet(losses, tokens, [], [])
    answers = generate(
        model,
        tokenizer,
        paper.prompts,
        max_new_tokens=paper.max_new_tokens,
        batch_size=paper.batch_size,
        progress=counter(progress, prefix + "answers", len(paper.prompts)) if progress else None,
    )
    if paper.scorer is None:
        return Sheet(losses, tokens, answers, [])
    right = [paper.scorer(answer, e) >= 1 for answer, e in zip(answers, paper.examples, strict=True)]
    return Sheet(losses, tokens, answers, right)


def row_losses(
    model: Any,
    rows: Sequence[Row],
    tokenizer: Any,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[float], list[int]]:
    """Compute the summed cross-entropy and the number of labelled tokens of each row.

    Args:
        model: a language model of transformers, with or without adapters.
        rows: rows of `adapterlab.data.encode`.
        tokenizer: for its padding token.
        batch_size: rows computed at once.
        progress: called with the number of rows that each batch adds.
    """
    first = 0 if is_encoder_decoder(model) else 1
    device = input_device(model)
    order = by_length(rows)  # little padding
    losses, tokens = [0.0] * len(rows), [0] * len(rows)
    with evaluating(model), fast_attention(model):
        longest = len(rows[order[0]]["input_ids"]) if order else 0
        padding = collator_for(model, tokenizer)
        packing, _ = choose(model, padding, longest)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            some = [rows[i] for i in chosen]
            collate = padding if further_columns(some) else packing
            each = _token_losses(model, placed(collate(some), device), first)
            counts = [sum(label != IGNORED for label in row["labels"][first:]) for row in some]
            for i, values in zip(chosen, each.split(counts), strict=True):
                losses[i], tokens[i] = float(values.sum()), len(values)
            if progress:
                progress(len(chosen))
    return losses, tokens


def _token_losses(model: Any, batch: Mapping[str, Any], first: int) -> Tensor:
    """The loss of each label of a batch, row by row, in float64; of the labels from the first that is predicted on."""
    labels = batch["labels"][:, first:]
    given = {**{key: value for key, value in batch.items() if key != "labels"}, "use_cache": False}
    if not first:
        logits = model(**batch).logits
    elif "logits_to_keep" in inspect.signature(plain_class(model).forward).parameters:
        # The vocabulary is large, and no row needs what follows a prompt's tokens.
        wanted = (labels != IGNORED).any(0).nonzero().flatten()
        labels = labels[:, wanted]
        logits = model(**given, logits_to_keep=wanted).logits
    else:
        logits = model(**given).logits[:, :-1]
    bears = labels != IGNORED
    # Only positions with a label become float32.
    return F.cross_entropy(logits[bears].float(), labels[bears], reduction="none").double()
