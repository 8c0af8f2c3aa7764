"""`score`: how good an adapter is on held-out examples, and how much better than its base."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapterlab.data import (
    Collator,
    DataConfig,
    Encoded,
    Example,
    Scorer,
    encode,
    load_data,
    prompt_of,
    scorer_for,
    wilson,
)
from adapterlab.errors import ConfigError, DataError
from adapterlab.evaluate.generation import generate, window_of
from adapterlab.evaluate.loss import evaluate_loss
from adapterlab.evaluate.opening import locate, open_target
from adapterlab.evaluate.progress import Progress, counter
from adapterlab.evaluate.result import Evaluation, Figures
from adapterlab.foreign.model import is_encoder_decoder
from adapterlab.hosts import Host, host
from adapterlab.io.atomic import write_json, write_text
from adapterlab.settings import explain

_SHORTEST = 64  # tokens an answer may have at least, so that a model that explains itself is not cut off at once
# Settings that say where rows come from. Where one of the first group is given, all of the second are a run's no more.
_EVAL_SOURCE = ("eval_path", "eval_split", "eval_size")
_REPLACES = (
    (("path", "task"), ("path", "task", "name", "task_args", "split", "limit", "eval_limit", "format", "columns")),
    (("path", "task", *_EVAL_SOURCE), _EVAL_SOURCE),
)


@dataclass(frozen=True)
class _Exam:
    """What every model under comparison is asked, the same for all."""

    examples: list[Example]
    encoded: Encoded
    scorer: Scorer | None
    why: str
    prompts: list[list[int]]
    max_new_tokens: int
    batch_size: int


@dataclass(frozen=True)
class _Sheet:
    """What one model made of the exam; without a scorer there are no answers."""

    figures: Figures
    answers: list[str]
    right: list[bool]


def score(
    target: str | Path | Host | Any,
    tokenizer: Any = None,
    *,
    data: DataConfig | Mapping[str, Any] | None = None,
    checkpoint: str = "best",
    model: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    samples: int = 5,
    base: bool = False,
    output: str | Path | None = None,
    device: str | None = None,
    precision: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate an adapter or model on examples it was not trained on.

    The loss is the exact mean over all labelled tokens. Where answers can be checked (see `data.scorer`), each
    example is answered greedily and the share of right answers comes with its 95 % Wilson interval.

    Args:
        target: a run folder, an adapter folder, the name of a model, a `Host`, or a model.
        tokenizer: needed with a `Host` or a model.
        data: the examples. For a run, settings that replace those it was trained with; needed for everything else.
        checkpoint: which adapter of a run: "best" or "last".
        model: another base model than the one the run or adapter names.
        limit: use the first n evaluation examples only.
        batch_size: examples computed at once.
        max_new_tokens: longest answer; by default twice the longest reference, and at least 64 tokens.
        samples: how many answers to keep in the result.
        base: evaluate the base model, with all adapters off, on the same examples.
        output: folder for the answers and the figures; by default `evaluation/` in a run folder, else none.
        device: where to compute; by default cuda, else mps, else cpu. For names and folders only.
        precision: of the base weights; by default that of the run, else "bf16". For names and folders only.
        progress: called with what is being done, how many examples are done, and their number.

    Raises:
        DataError: there are no evaluation examples, or one does not fit into the model's window.
        ConfigError: settings are missing or contradict each other.
        FormatError: a run or adapter folder is damaged.
    """
    label, cfg, net, tokenizer, output = _resolve(
        target, tokenizer, data, checkpoint, model, output, device=device, precision=precision
    )
    attached = host(net)
    if base and attached is None:
        raise ConfigError(f"base=True compares adapters with their base, and {label} carries no adapter. Leave it out.")
    began = time.monotonic()
    exam, source = _exam(cfg, net, tokenizer, limit, batch_size, max_new_tokens)
    sheet, plain = _sit(exam, net, tokenizer, progress, ""), None
    if base and attached is not None:
        with attached.using():
            plain = _sit(exam, net, tokenizer, progress, "base: ")
    rows = _rows(exam, sheet, plain)
    paired = list(zip(sheet.right, plain.right, strict=True)) if plain and exam.scorer else None
    stem = None if output is None else Path(output) / _stem(checkpoint, data, limit)
    result = Evaluation(
        **{f.name: getattr(sheet.figures, f.name) for f in dataclasses.fields(Figures)},
        target=label,
        source=source,
        scorer=exam.scorer.name if exam.scorer else None,
        why_no_score=exam.why,
        max_new_tokens=exam.max_new_tokens if exam.scorer else None,
        seconds=time.monotonic() - began,
        answers=stem.with_suffix(".jsonl") if stem and rows else None,
        samples=tuple(rows[:samples]),
        base=plain.figures if plain else None,
        fixed=sum(now and not then for now, then in paired) if paired else None,
        broken=sum(then and not now for now, then in paired) if paired else None,
    )
    _write(result, stem, rows)
    return result


def _write(result: Evaluation, stem: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    if stem is None:
        return
    if result.answers is not None:
        write_text(result.answers, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(stem.with_suffix(".json"), result.to_dict())


def _resolve(
    target: Any,
    tokenizer: Any,
    data: DataConfig | Mapping[str, Any] | None,
    checkpoint: str,
    model: str | None,
    output: str | Path | None,
    **options: str | None,
) -> tuple[str, DataConfig, Any, Any, str | Path | None]:
    """Label, data settings, model, tokenizer and output folder of a target."""
    if not isinstance(target, (str, Path)):
        net = target.model if isinstance(target, Host) else target
        if tokenizer is None:
            raise ConfigError("score needs the tokenizer when it is given a model: score(model, tokenizer, data=...).")
        return type(net).__name__, _data(data, None), net, tokenizer, output
    place = locate(target, model=model, checkpoint=checkpoint)
    cfg = _data(data, place.data)  # before the model is loaded: a wrong setting should not cost a minute
    opened = open_target(place, **options)
    if output is None and place.run is not None:
        output = place.run / "evaluation"
    return str(place.adapter or place.base), cfg, opened.model, tokenizer or opened.tokenizer, output


def _data(given: DataConfig | Mapping[str, Any] | None, of_run: Mapping[str, Any] | None) -> DataConfig:
    if isinstance(given, DataConfig):
        return given
    if given is None and of_run is None:
        raise ConfigError(
            "Only a run folder knows its data. Say what to evaluate on: data=DataConfig(eval_path=..., path=...) in "
            "Python, --data eval_path=FILE on the command line."
        )
    given, run = dict(given or {}), dict(of_run or {})
    if "eval_path" in given and not run.get("path"):
        given.setdefault("path", given["eval_path"])
    for given_one, replaced in _REPLACES:
        if not given.keys().isdisjoint(given_one):
            run = {key: value for key, value in run.items() if key not in replaced}
    try:
        return DataConfig(**{**run, **given})
    except ValidationError as error:
        raise ConfigError(explain(error, DataConfig)) from None


def _exam(
    cfg: DataConfig, model: Any, tokenizer: Any, limit: int | None, batch_size: int, max_new_tokens: int | None
) -> tuple[_Exam, str]:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be 1 or more; received {limit}. Leave it out to use all examples.")
    splits = load_data(cfg)
    examples = splits.eval[:limit]
    if not examples:
        raise DataError(
            f"There are no evaluation examples in {splits.eval_source}. Set data.eval_path, data.eval_split or a "
            "data.eval_size above 0."
        )
    scorer = scorer_for(cfg, dataclasses.replace(splits, eval=examples))
    seq2seq = is_encoder_decoder(model)
    window = window_of(model, tokenizer)
    encoded = encode(examples, tokenizer, cfg, window=window, seq2seq=seq2seq)
    prompts = [prompt_of(e, tokenizer, cfg, seq2seq=seq2seq) for e in examples] if scorer else []
    if scorer and encoded.report.dropped:  # rows that are too long for training are too long for the exam
        kept = [i for i, ids in enumerate(prompts) if len(ids) < encoded.report.limit]
        examples, prompts = [examples[i] for i in kept], [prompts[i] for i in kept]
    tokens = _answer_limit(examples, tokenizer, prompts, None if seq2seq else window, max_new_tokens) if scorer else 0
    why = "" if scorer else _why(cfg, examples)
    return _Exam(examples, encoded, scorer, why, prompts, tokens, batch_size), splits.eval_source


def _why(cfg: DataConfig, examples: Sequence[Example]) -> str:
    if cfg.scorer == "none":
        return "data.scorer is none"
    if examples[0].messages is None:
        return "plain text has no prompt to answer"
    return "the reference answers are long free text, for which only the loss tells"


def _answer_limit(
    examples: Sequence[Example], tokenizer: Any, prompts: Sequence[list[int]], window: int | None, asked: int | None
) -> int:
    """Longest answer in tokens: as asked, else room for twice the longest reference."""
    if asked is not None:
        return asked
    texts = [e.messages[-1]["content"] for e in examples if e.messages]
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


def _sit(exam: _Exam, model: Any, tokenizer: Any, progress: Progress | None, prefix: str) -> _Sheet:
    """Take the exam with the model as it stands."""
    rows, n = exam.encoded.rows, len(exam.examples)
    collator = Collator(tokenizer.pad_token_id or 0, seq2seq=is_encoder_decoder(model))
    loss, tokens = evaluate_loss(
        model, rows, collator, exam.batch_size, progress=_counter(progress, prefix + "loss", len(rows))
    )
    if exam.scorer is None:
        return _Sheet(Figures(loss=loss, tokens=tokens, n=n), [], [])
    answers = generate(
        model,
        tokenizer,
        exam.prompts,
        max_new_tokens=exam.max_new_tokens,
        batch_size=exam.batch_size,
        progress=_counter(progress, prefix + "answers", n),
    )
    right = [exam.scorer(answer, e) >= 1 for answer, e in zip(answers, exam.examples, strict=True)]
    figures = Figures(loss=loss, tokens=tokens, n=n, correct=sum(right), interval=wilson(sum(right), n))
    return _Sheet(figures, answers, right)


def _counter(progress: Progress | None, phase: str, total: int) -> Callable[[int], None] | None:
    return counter(progress, phase, total) if progress else None


def _rows(exam: _Exam, sheet: _Sheet, plain: _Sheet | None) -> list[dict[str, Any]]:
    """One row an example: what was asked, expected and answered."""
    rows: list[dict[str, Any]] = []
    for i, answer in enumerate(sheet.answers):
        example = exam.examples[i]
        row = {"row": example.row, "prompt": example.prompt, "reference": example.answer}
        row |= {"answer": answer, "score": float(sheet.right[i])}
        if plain:
            row |= {"base_answer": plain.answers[i], "base_score": float(plain.right[i])}
        rows.append(row)
    return rows


def _stem(checkpoint: str, data: Any, limit: int | None) -> str:
    """File name of a result: an evaluation on other examples must not replace that on the run's own."""
    if data is None and limit is None:
        return checkpoint
    plain = data.model_dump() if isinstance(data, DataConfig) else dict(data or {})
    digest = hashlib.sha256(json.dumps([plain, limit], sort_keys=True, default=str).encode()).hexdigest()
    return f"{checkpoint}-{digest[:8]}"
