"""The exam that every checkpoint takes: the same rows, loss and answer of each row kept apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterlab.compare.config import Exams
from adapterlab.compare.results import Exam, Sample
from adapterlab.data import (
    Collator,
    DataConfig,
    Example,
    Scorer,
    encode,
    load_data,
    placed,
    prompt_of,
    scorer_for,
    wilson,
)
from adapterlab.engine.attention import fast_attention
from adapterlab.engine.modes import evaluating
from adapterlab.errors import DataError
from adapterlab.evaluate import generate, window_of
from adapterlab.foreign.model import input_device, is_encoder_decoder

Row = Mapping[str, Sequence[int]]
_SPARE = 8  # tokens an answer may have beyond twice the longest reference
_BLOCK = 256  # tokens of a row of general text


@dataclass(frozen=True)
class Paper:
    """What is asked.

    Attributes:
        examples: evaluation examples.
        rows: their tokens and labels.
        prompts: their tokens up to the answer; empty without a scorer.
        scorer: None where answers are not scored.
        max_new_tokens: longest answer.
        settings: batch size and samples.
    """

    examples: list[Example]
    rows: list[dict[str, list[int]]]
    prompts: list[list[int]]
    scorer: Scorer | None
    max_new_tokens: int
    settings: Exams


def set_paper(data: DataConfig, settings: Exams, model: Any, tokenizer: Any) -> Paper:
    """Prepare the exam for a model.

    Args:
        data: where the evaluation rows come from, and how answers are scored.
        settings: of the exam.
        model: to be examined.
        tokenizer: its tokenizer.

    Raises:
        DataError: there are no evaluation rows, or a row does not fit into the model's window.
    """
    splits = load_data(data)
    examples = splits.eval[: settings.limit]
    if not examples:
        raise DataError(f"There are no evaluation rows in {splits.eval_source}. Set data.eval_size above 0.")
    scorer = scorer_for(data, dataclasses.replace(splits, eval=examples))
    seq2seq, window = is_encoder_decoder(model), window_of(model, tokenizer)
    encoded = encode(examples, tokenizer, data, window=window, seq2seq=seq2seq)
    if encoded.report.dropped:
        raise DataError(
            f"{encoded.report.dropped} evaluation rows leave no room for an answer within {encoded.report.limit} "
            "tokens. Raise data.max_length, or remove them: all methods must be asked the same."
        )
    prompts = [prompt_of(e, tokenizer, data, seq2seq=seq2seq) for e in examples] if scorer else []
    longest = max(sum(label != -100 for label in row["labels"]) for row in encoded.rows)
    tokens = settings.max_new_tokens or 2 * longest + _SPARE
    if prompts and window and not seq2seq:
        tokens = min(tokens, window - max(map(len, prompts)))
    return Paper(examples, encoded.rows, prompts, scorer, tokens, settings)


def sit(paper: Paper, model: Any, tokenizer: Any, progress: Callable[[int], None] | None = None) -> Exam:
    """Let a model take the exam as it stands."""
    losses, tokens = row_losses(model, paper.rows, tokenizer, paper.settings.batch_size)
    loss = sum(losses) / sum(tokens)
    if paper.scorer is None:
        return Exam(loss=loss, losses=losses, tokens=tokens)
    answers = generate(
        model, tokenizer, paper.prompts, max_new_tokens=paper.max_new_tokens, batch_size=paper.settings.batch_size,
        progress=progress,
    )  # fmt: skip
    right = [int(paper.scorer(answer, e) >= 1) for answer, e in zip(answers, paper.examples, strict=True)]
    shown = list(zip(paper.examples, answers, right, strict=True))[: paper.settings.samples]
    samples = [
        Sample(row=i, prompt=e.prompt, reference=str(e.answer or ""), answer=answer, right=bool(ok))
        for i, (e, answer, ok) in enumerate(shown)
    ]
    score, span = sum(right) / len(right), wilson(sum(right), len(right))
    return Exam(loss=loss, losses=losses, tokens=tokens, score=score, interval=span, right=right, samples=samples)


def row_losses(model: Any, rows: Sequence[Row], tokenizer: Any, batch_size: int) -> tuple[list[float], list[int]]:
    """Compute the summed cross-entropy and the number of labelled tokens of each row.

    Args:
        model: a language model of transformers, with or without adapters.
        rows: rows of `adapterlab.data.encode`.
        tokenizer: for its padding token.
        batch_size: rows computed at once.
    """
    seq2seq = is_encoder_decoder(model)
    collate = Collator(tokenizer.pad_token_id or 0, seq2seq=seq2seq)
    device = input_device(model)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    losses, tokens = [0.0] * len(rows), [0] * len(rows)
    with evaluating(model), fast_attention(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = placed(collate([rows[i] for i in chosen]), device)
            for i, (value, count) in zip(chosen, _sums(model, batch, seq2seq), strict=True):
                losses[i], tokens[i] = value, count
    return losses, tokens


def _sums(model: Any, batch: Mapping[str, Tensor], seq2seq: bool) -> list[tuple[float, int]]:
    labels = batch["labels"]
    if seq2seq:
        logits = model(**batch).logits
    else:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        logits, labels = logits[:, :-1], labels[:, 1:]
    bears = labels != -100
    each = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    # Only positions with a label become float32: the vocabulary is large.
    each[bears] = F.cross_entropy(logits[bears].float(), labels[bears], reduction="none").double()
    return list(zip(each.sum(dim=1).tolist(), bears.sum(dim=1).tolist(), strict=True))


def general_loss(model: Any, tokenizer: Any) -> float | None:
    """Compute the mean token loss on the general English text of the package; None for a model with an encoder."""
    if is_encoder_decoder(model):
        return None
    text = resources.files("adapterlab.compare").joinpath("general.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, verbose=False)["input_ids"]
    size = min(_BLOCK, window_of(model, tokenizer) or _BLOCK)
    blocks = [ids[i : i + size] for i in range(0, len(ids), size)]
    rows = [{"input_ids": block, "labels": block} for block in blocks if len(block) > 1]
    losses, tokens = row_losses(model, rows, tokenizer, batch_size=4)
    return sum(losses) / sum(tokens)
