"""`score`: how good an adapter is on held-out examples, and how much better than its base."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapterlab.data import (
    DataConfig,
)
from adapterlab.errors import ConfigError, OutputError
from adapterlab.evaluate.examination import Paper, Sheet, set_paper, sit
from adapterlab.evaluate.opening import locate, open_target
from adapterlab.evaluate.progress import Progress
from adapterlab.evaluate.result import Evaluation, Figures
from adapterlab.hosts import Host, host
from adapterlab.io.atomic import write_json, write_text
from adapterlab.io.disk import alone, explained, tidy
from adapterlab.json_text import digest, parsed
from adapterlab.paths import user_path
from adapterlab.settings import explain

_FIGURES, _ANSWERS = {"target", "source", "loss"}, {"prompt", "reference", "answer"}  # what their files say for certain
_PATIENCE = 60  # seconds to wait while another evaluation writes
# Settings that say where rows come from. Where one of the first group is given, all of the second are a run's no more.
_EVAL_SOURCE = ("eval_path", "eval_split", "eval_size")
_REPLACES = (
    (
        ("path", "task", "sources"),
        ("path", "task", "sources", "mixing", "streaming", "window", "name", "revision", "task_args", "split", "limit",
         "eval_limit", "format", "columns", "ignore"),
    ),
    (("path", "task", "sources", *_EVAL_SOURCE), _EVAL_SOURCE),
)  # fmt: skip


def score(
    target: str | Path | Host | Any,
    tokenizer: Any = None,
    *,
    data: DataConfig | Mapping[str, Any] | None = None,
    checkpoint: str = "best",
    model: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
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
        samples: how many answers to keep in the result; where answers are not scored, how many to ask for.
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
        OutputError: a file in the output folder would be replaced that is no evaluation of this target.
    """
    label, cfg, net, tokenizer, stem = _resolve(
        target, tokenizer, data, checkpoint, model, output, limit, trust_remote_code, device=device, precision=precision
    )
    attached = host(net)
    if base and attached is None:
        raise ConfigError(f"base=True compares adapters with their base, and {label} carries no adapter. Leave it out.")
    began = time.monotonic()
    paper = set_paper(
        cfg, net, tokenizer, limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens, samples=samples
    )
    sheet, plain = sit(paper, net, tokenizer, progress), None
    if base and attached is not None:
        with attached.using():
            plain = sit(paper, net, tokenizer, progress, "base: ")
    rows = _rows(paper, sheet, plain)
    paired = list(zip(sheet.right, plain.right, strict=True)) if plain and paper.scorer else None
    figures = _figures(sheet, paper)
    result = Evaluation(
        **{f.name: getattr(figures, f.name) for f in dataclasses.fields(Figures)},
        target=label,
        source=paper.source,
        left_out=paper.left_out,
        columns=dataclasses.asdict(paper.columns),
        scorer=paper.scorer.name if paper.scorer else None,
        why_no_score=paper.why,
        max_new_tokens=paper.max_new_tokens or None,
        seconds=time.monotonic() - began,
        answers=stem.with_suffix(".jsonl") if stem and rows else None,
        samples=tuple(rows[:samples]),
        base=_figures(plain, paper) if plain else None,
        fixed=sum(now and not then for now, then in paired) if paired else None,
        broken=sum(then and not now for now, then in paired) if paired else None,
    )
    _write(result, stem, rows)
    return result


def _write(result: Evaluation, stem: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    if stem is None:
        return
    with explained(stem.parent):
        stem.parent.mkdir(parents=True, exist_ok=True)
    with alone(stem.parent, wait=_PATIENCE):  # answers and figures belong together
        tidy(stem.parent)
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
    limit: int | None,
    trust_remote_code: bool,
    **options: str | None,
) -> tuple[str, DataConfig, Any, Any, Path | None]:
    """Label, data settings, model and tokenizer of a target, and where its results go, without their endings."""
    stem = None if output is None else user_path(output) / _stem(checkpoint, data, limit)
    if not isinstance(target, (str, Path)):
        net = target.model if isinstance(target, Host) else target
        if tokenizer is None:
            raise ConfigError("score needs the tokenizer when it is given a model: score(model, tokenizer, data=...).")
        _check_results(stem, label := type(net).__name__)
        return label, _data(data, None), net, tokenizer, stem
    place = locate(target, model=model, checkpoint=checkpoint, trust_remote_code=trust_remote_code)
    cfg = _data(data, place.data)  # before the model is loaded: a wrong setting should not cost a minute
    label = str(place.adapter or place.base)
    _check_results(stem, label)
    if stem is None and place.run is not None:
        stem = place.run / "evaluation" / _stem(checkpoint, data, limit)
        _check_results(stem, None)  # a run that was moved is still the same
    opened = open_target(place, **options)
    return label, cfg, opened.model, tokenizer or opened.tokenizer, stem


def _check_results(stem: Path | None, label: str | None) -> None:
    """Check that nothing else is replaced than an earlier evaluation, of the same target where one is given.

    Raises:
        OutputError: there is something else.
    """
    if stem is None:
        return
    figures, answers = stem.with_suffix(".json"), stem.with_suffix(".jsonl")
    for file, keys in ((figures, _FIGURES), (answers, _ANSWERS)):
        found = _first_object(file)
        if found is not None and not keys <= found.keys():
            raise OutputError(
                f"{file} is there already and no evaluation of adapterlab, so it is left alone. Choose another output."
            )
    target = str((_first_object(figures) or {}).get("target", label))
    if label is not None and Path(target).resolve() != Path(label).resolve():
        raise OutputError(
            f"{figures} is the evaluation of {target}, and would be replaced by that of {label}. Choose another output."
        )


def _first_object(file: Path) -> dict[str, Any] | None:
    """What a JSON file holds, or the first line of a file of lines; empty when it is no object, None when not there."""
    if not os.path.lexists(file):
        return None
    try:
        with file.open(encoding="utf-8") as stream:
            found = parsed(stream.readline() if file.suffix == ".jsonl" else stream.read())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


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


def _figures(sheet: Sheet, paper: Paper | None = None) -> Figures:
    parts = {name: sheet.part(numbers) for name, numbers in paper.sources.items()} if paper else {}
    return Figures(
        loss=sheet.loss,
        tokens=sum(sheet.tokens),
        n=len(sheet.tokens),
        correct=sum(sheet.right) if sheet.right else None,
        interval=sheet.interval,
        sources={name: _figures(part) for name, part in parts.items()},
    )


def _rows(paper: Paper, sheet: Sheet, plain: Sheet | None) -> list[dict[str, Any]]:
    """One row an example: what was asked, expected and answered."""
    rows: list[dict[str, Any]] = []
    for i, answer in enumerate(sheet.answers):
        example = paper.examples[i]
        row = {"row": example.row, "prompt": example.prompt, "reference": example.answer}
        row |= {"answer": answer, "score": _score(sheet, i)}
        if plain:
            row |= {"base_answer": plain.answers[i], "base_score": _score(plain, i)}
        rows.append(row)
    return rows


def _score(sheet: Sheet, i: int) -> float | None:
    return float(sheet.right[i]) if sheet.right else None


def _stem(checkpoint: str, data: Any, limit: int | None) -> str:
    """File name of a result: an evaluation on other examples must not replace that on the run's own."""
    if data is None and limit is None:
        return checkpoint
    plain = data.model_dump() if isinstance(data, DataConfig) else dict(data or {})
    return f"{checkpoint}-{digest([plain, limit])[:8]}"
