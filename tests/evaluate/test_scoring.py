from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import adapterlab as al
from adapterlab.data import DataConfig, wilson
from adapterlab.errors import ConfigError, DataError
from adapterlab.evaluate import score
from adapterlab.evaluate.generation import chat_ids, generate

QUESTIONS = ["who?", "what is it that you want?", "when", "where do they go now?", "why not", "how many are there?"]


@pytest.fixture
def known(model: Any, tokenizer: Any, adapted: Any, tmp_path: Path) -> tuple[Any, Path, list[str], list[str]]:
    """A host, and rows for which both models' answers are known: the adapter's 3 times, the base's 2, and neither."""
    ids = [chat_ids(tokenizer, [{"role": "user", "content": q}]) for q in QUESTIONS]
    base = generate(model, tokenizer, ids, max_new_tokens=5)
    host = adapted(model, 1)
    ours = generate(model, tokenizer, ids, max_new_tokens=5)
    assert all(a != b for a, b in zip(ours, base, strict=True))
    answers = [ours[0], base[1], ours[2], "neither", ours[4], base[5]]
    file = tmp_path / "known.jsonl"
    rows = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return host, file, ours, base


def by_hand(model: Any, tokenizer: Any, file: Path) -> tuple[float, int]:
    """Reference: the loss of answer and end-of-turn token, row by row, from the text."""
    losses: list[float] = []
    for row in map(json.loads, file.read_text().splitlines()):
        prompt = chat_ids(tokenizer, [{"role": "user", "content": row["question"]}])
        answer = tokenizer(row["answer"] + "<|im_end|>")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses += F.cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
    return sum(losses) / len(losses), len(losses)


def test_figures_pairs_and_answers(known: Any, tokenizer: Any, tmp_path: Path) -> None:
    host, file, ours, base = known
    data = DataConfig(path=str(file), eval_path=str(file), scorer="exact")
    found = al.score(
        host, tokenizer, data=data, base=True, max_new_tokens=5, batch_size=4, samples=2, output=tmp_path / "out"
    )
    assert (found.correct, found.n, found.score, found.interval) == (3, 6, 0.5, wilson(3, 6))
    assert found.base is not None
    assert (found.base.correct, found.base.interval) == (2, wilson(2, 6))
    assert (found.fixed, found.broken) == (3, 2)
    loss, tokens = by_hand(host.model, tokenizer, file)
    assert (found.loss, found.tokens) == (pytest.approx(loss, rel=1e-4), tokens)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    with host.using():
        assert found.base.loss == pytest.approx(by_hand(host.model, tokenizer, file)[0], rel=1e-4)
    assert host.active == ("default",)

    assert found.answers is not None
    rows = [json.loads(line) for line in found.answers.read_text().splitlines()]
    assert [row["answer"] for row in rows] == ours
    assert [row["base_answer"] for row in rows] == base
    assert [row["score"] for row in rows] == [1, 0, 1, 0, 1, 0]
    assert [row["base_score"] for row in rows] == [0, 1, 0, 0, 0, 1]
    assert rows[2] | {"row": 3, "prompt": "when", "reference": ours[2]} == rows[2]
    assert list(found.samples) == rows[:2]
    (written,) = found.answers.parent.glob("*.json")
    assert json.loads(written.read_text()) == json.loads(json.dumps(found.to_dict()))
    assert found.to_dict()["base"]["score"] == pytest.approx(2 / 6)


def test_each_of_several_sources_has_its_own_figures(known: Any, tokenizer: Any, tmp_path: Path) -> None:
    host, file, ours, _ = known
    right = tmp_path / "right.jsonl"
    rows = [{"question": q, "answer": a} for q, a in zip(QUESTIONS[:3], ours, strict=False)]
    right.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(f), "eval_path": str(f)} for f in (file, right)]
    data = DataConfig(sources=sources, scorer="exact")
    found = al.score(host, tokenizer, data=data, base=True, max_new_tokens=5, batch_size=4)
    assert {name: (part.correct, part.n) for name, part in found.sources.items()} == {"known": (3, 6), "right": (3, 3)}
    assert found.n == 9
    alone = al.score(host, tokenizer, data=DataConfig(path=str(right), eval_path=str(right)), max_new_tokens=5)
    assert found.sources["right"].loss == pytest.approx(alone.loss, rel=1e-5)
    assert sum(part.loss * part.tokens for part in found.sources.values()) == pytest.approx(found.loss * found.tokens)
    assert found.base is not None
    assert found.base.sources.keys() == found.sources.keys()
    assert found.to_dict()["sources"]["right"]["correct"] == 3
    assert "sources" not in alone.to_dict()
    few = al.score(host, tokenizer, data=data, limit=7, max_new_tokens=5)
    assert {name: part.n for name, part in few.sources.items()} == {"known": 6, "right": 1}


def test_limit_takes_the_first_examples(known: Any, tokenizer: Any) -> None:
    host, file, _, _ = known
    data = {"eval_path": str(file), "scorer": "exact"}
    found = score(host, tokenizer, data=data, limit=2, max_new_tokens=5)
    assert (found.n, found.correct, found.base, found.fixed, found.answers) == (2, 1, None, None, None)


def test_a_run_brings_its_data_and_keeps_its_answers(run_folder: Path, rows: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    best = score(run_folder, progress=lambda *report: seen.append(report))
    last = score(run_folder, checkpoint="last", max_new_tokens=2)
    assert best.loss != last.loss
    assert (best.n, best.scorer) == (6, "exact")
    assert best.max_new_tokens == 64
    assert ("loss", 6, 6) in seen
    assert ("answers", 6, 6) in seen
    folder = run_folder / "evaluation"
    assert best.answers == folder / "best.jsonl"
    before = best.answers.read_text()
    short = score(run_folder, data={"system": "be brief"}, limit=2, max_new_tokens=2)
    assert short.loss != best.loss
    assert best.answers.read_text() == before
    assert len(list(folder.glob("best-*.jsonl"))) == 1
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_other_data_replaces_the_source_of_a_run(run_folder: Path, rows: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"question": "so?", "answer": "42"}) + "\n")
    found = score(run_folder, data={"eval_path": str(more)}, max_new_tokens=2)
    assert (found.n, found.source) == (1, str(more))
    again = score(run_folder, data={"path": str(rows), "eval_size": 2}, max_new_tokens=2)
    assert again.n == 2


def test_free_text_has_a_loss_only(adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "the ship left the harbour"}) + "\n")
    found = score(adapter, data={"eval_path": str(file)}, output=tmp_path / "out", precision="fp32")
    assert (found.score, found.interval, found.scorer, found.answers) == (None, None, None, None)
    assert "plain text" in found.why_no_score
    assert found.loss > 0
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"question": "tell", "answer": "once upon a time " * 5}) + "\n")
    read = score(adapter, data={"eval_path": str(long)}, samples=1, base=True, max_new_tokens=3)
    assert "free text" in read.why_no_score
    (sample,) = read.samples
    assert (read.score, sample["score"], sample["base_score"], read.correct) == (None, None, None, None)
    assert sample.keys() >= {"prompt", "reference", "answer", "base_answer"}
    assert "data.scorer is none" in score(adapter, data={"eval_path": str(long), "scorer": "none"}).why_no_score


def test_rows_too_long_for_training_are_left_out_of_both(adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    rows = [{"question": "a", "answer": "b"}, {"question": "c" * 200, "answer": "d"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"eval_path": str(file), "max_length": 100, "scorer": "exact"}
    with pytest.raises(DataError, match="row 2"):
        score(adapter, data=data)
    found = score(adapter, data={**data, "too_long": "drop"}, samples=9, max_new_tokens=2)
    assert (found.n, len(found.samples)) == (1, 1)


def test_bad_input(known: Any, model: Any, tokenizer: Any, adapter: Path, rows: Path, base_folder: Path) -> None:
    host, _, _, _ = known
    with pytest.raises(ConfigError, match="needs the tokenizer"):
        score(host, data={"eval_path": str(rows)})
    with pytest.raises(ConfigError, match=r"--data eval_path=FILE"):
        score(adapter)
    with pytest.raises(ConfigError, match=r"no setting 'eval_pat'.*Nearest: .*eval_path"):
        score(adapter, data={"eval_pat": "x"})
    with pytest.raises(DataError, match=r"no evaluation examples.*data\.eval_size"):
        score(host, tokenizer, data={"path": str(rows), "eval_size": 0})
    with pytest.raises(ConfigError, match="received 0"):
        score(host, tokenizer, data={"eval_path": str(rows)}, limit=0)
    with pytest.raises(ConfigError, match="carries no adapter"):
        score(base_folder, data={"eval_path": str(rows)}, base=True)


def test_a_prompt_that_leaves_no_room_for_an_answer(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"question": "q" * 470, "answer": "a" * 30}) + "\n")
    data = {"eval_path": str(file), "scorer": "exact"}
    with pytest.raises(DataError, match=r"row 1 has 4\d\d of the 512 tokens.*longest reference has 31"):
        score(model, tokenizer, data=data)
    assert score(model, tokenizer, data=data, max_new_tokens=4).n == 1


def test_examples_that_training_drops_are_asked_of_nobody_and_counted(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [
        {"question": "when", "answer": "now"},
        {"question": "q" * 90, "answer": "x"},
        {"question": "who", "answer": "me"},
    ]
    for name, kept in (("all", rows), ("short", rows[::2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    settings = {"scorer": "exact", "max_length": 64, "too_long": "drop"}
    found, wanted = (
        score(model, tokenizer, data={"eval_path": str(tmp_path / f"{name}.jsonl"), **settings}, max_new_tokens=3)
        for name in ("all", "short")
    )
    assert (found.left_out, wanted.left_out) == (1, 0)
    assert (found.n, found.loss, found.tokens) == (wanted.n, pytest.approx(wanted.loss, rel=1e-6), wanted.tokens)
    assert [row["row"] for row in found.samples] == [1, 3]
