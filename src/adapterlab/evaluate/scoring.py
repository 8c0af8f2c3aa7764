"""`score`: how good an adapter is on held-out examples, and how much better than its base."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapterlab.data import (
    DataConfig,
)
from adapterlab.errors import ConfigError
from adapterlab.evaluate.examination import Paper, Sheet, set_paper, sit
from adapterlab.evaluate.opening import locate, open_target
from adapterlab.evaluate.progress import Progress
from adapterlab.evaluate.result import Evaluation, Figures
from adapterlab.hosts import Host, host
from adapterlab.io.atomic import write_json, write_text
from adapterlab.settings import explain

# Settings that say where rows come from. Where one of the first group is given, all of the second are a run's no more.
_EVAL_SOURCE = ("eval_path", "eval_split", "eval_size")
_REPLACES = (
    (
        ("path", "task"),
        ("path", "task", "name", "task_args", "split", "limit", "eval_limit", "format", "columns", "ignore"),
    ),
    (("path", "task", *_EVAL_SOURCE), _EVAL_SOURCE),
)


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
    trust_remote_code: bool = False,
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
        trust_remote_code: run the code that a model's folder brings. For names and folders only.
        progress: called with what is being done, how many examples are done, and their number.

    Raises:
        DataError: there are no evaluation examples, or one does not fit into the model's window.
        ConfigError: settings are missing or contradict each other.
        FormatError: a run or adapter folder is damaged.
    """
    label, cfg, net, tokenizer, output = _resolve(
        target, tokenizer, data, checkpoint, model, output, trust_remote_code, device=device, precision=precision
    )
    attached = host(net)
    if base and attached is None:
        raise ConfigError(f"base=True compares adapters with their base, and {label} carries no adapter. Leave it out.")
    began = time.monotonic()
    paper = set_paper(cfg, net, tokenizer, limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens)
    sheet, plain = sit(paper, net, tokenizer, progress), None
    if base and attached is not None:
        with attached.using():
            plain = sit(paper, net, tokenizer, progress, "base: ")
    rows = _rows(paper, sheet, plain)
    paired = list(zip(sheet.right, plain.right, strict=True)) if plain and paper.scorer else None
    figures = _figures(sheet)
    stem = None if output is None else Path(output) / _stem(checkpoint, data, limit)
    result = Evaluation(
        **{f.name: getattr(figures, f.name) for f in dataclasses.fields(Figures)},
        target=label,
        source=paper.source,
        left_out=paper.left_out,
        columns=dataclasses.asdict(paper.columns),
        scorer=paper.scorer.name if paper.scorer else None,
        why_no_score=paper.why,
        max_new_tokens=paper.max_new_tokens if paper.scorer else None,
        seconds=time.monotonic() - began,
        answers=stem.with_suffix(".jsonl") if stem and rows else None,
        samples=tuple(rows[:samples]),
        base=_figures(plain) if plain else None,
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
    trust_remote_code: bool,
    **options: str | None,
) -> tuple[str, DataConfig, Any, Any, str | Path | None]:
    """Label, data settings, model, tokenizer and output folder of a target."""
    if not isinstance(target, (str, Path)):
        net = target.model if isinstance(target, Host) else target
        if tokenizer is None:
            raise ConfigError("score needs the tokenizer when it is given a model: score(model, tokenizer, data=...).")
        return type(net).__name__, _data(data, None), net, tokenizer, output
    place = locate(target, model=model, checkpoint=checkpoint, trust_remote_code=trust_remote_code)
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


def _figures(sheet: Sheet) -> Figures:
    return Figures(
        loss=sheet.loss,
        tokens=sum(sheet.tokens),
        n=len(sheet.tokens),
        correct=sum(sheet.right) if sheet.right else None,
        interval=sheet.interval,
    )


def _rows(paper: Paper, sheet: Sheet, plain: Sheet | None) -> list[dict[str, Any]]:
    """One row an example: what was asked, expected and answered."""
    rows: list[dict[str, Any]] = []
    for i, answer in enumerate(sheet.answers):
        example = paper.examples[i]
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
