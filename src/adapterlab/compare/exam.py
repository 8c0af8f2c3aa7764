"""What a comparison records of the examination, and a text that no method trained on."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from adapterlab.compare.results import Exam, Sample
from adapterlab.evaluate.examination import Paper, Sheet, row_losses
from adapterlab.evaluate.generation import window_of
from adapterlab.foreign.model import is_encoder_decoder

_BLOCK = 256  # tokens of a row of general text


def recorded(paper: Paper, sheet: Sheet, samples: int) -> Exam:
    """Return what one checkpoint made of the examination, with the first few answers."""
    right: Sequence[bool | None] = sheet.right or [None] * len(sheet.answers)
    shown = list(zip(paper.examples, sheet.answers, right, strict=False))[:samples]
    return Exam(
        loss=sheet.loss,
        losses=sheet.losses,
        tokens=sheet.tokens,
        left_out=paper.left_out,
        score=sheet.score,
        interval=sheet.interval,
        right=[int(ok) for ok in sheet.right],
        samples=[
            Sample(row=i, prompt=e.prompt, reference=str(e.answer or ""), answer=answer, right=ok)
            for i, (e, answer, ok) in enumerate(shown)
        ],
    )


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
