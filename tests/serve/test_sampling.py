"""Choosing tokens and making text of them, against formulas written down here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from served import ask
from transformers import AutoTokenizer

from adapterlab.errors import ServingError
from adapterlab.serve import Request, Sampling
from adapterlab.serve.sampling import Chooser, Text
from tiny_folder import write_model

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0])


def drawn(count: int = 4000, **settings: Any) -> torch.Tensor:
    """Shares of the tokens that are drawn."""
    chooser = Chooser(Sampling(seed=1, **settings), 0, 1)
    found = torch.tensor([chooser.choose(LOGITS, [1, 0, 0, 2]).id for _ in range(count)])
    return torch.bincount(found, minlength=5) / count


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, LOGITS.softmax(0)),
        ({"temperature": 0.5}, (LOGITS / 0.5).softmax(0)),
        ({"top_k": 2}, torch.tensor([math.e / (1 + math.e), 1 / (1 + math.e), 0, 0, 0])),
        ({"top_p": 0.3}, torch.tensor([1.0, 0, 0, 0, 0])),
        ({"min_p": 0.3}, torch.tensor([math.e / (1 + math.e), 1 / (1 + math.e), 0, 0, 0])),
        ({"bias": {3: 3.0}}, (LOGITS + torch.tensor([0, 0, 0, 3.0, 0])).softmax(0)),
        # Of the answer [0, 0, 2], the prompt left out.
        ({"presence_penalty": 1.0}, (LOGITS - torch.tensor([1.0, 0, 1, 0, 0])).softmax(0)),
        ({"frequency_penalty": 0.5}, (LOGITS - torch.tensor([1.0, 0, 0.5, 0, 0])).softmax(0)),
        # Of prompt and answer.
        ({"repetition_penalty": 2.0}, torch.tensor([1.0, 0.5, 0.25, -1, 0]).softmax(0)),
    ],
)
def test_shares_are_those_of_the_formula(settings: dict[str, Any], expected: torch.Tensor) -> None:
    torch.testing.assert_close(drawn(**settings), expected, atol=0.03, rtol=0)


def test_a_seed_means_the_same_and_answers_differ() -> None:
    def ids(index: int, seed: int | None) -> list[int]:
        chooser = Chooser(Sampling(seed=seed), index, 1)
        return [chooser.choose(LOGITS, [1]).id for _ in range(40)]

    assert ids(0, 3) == ids(0, 3)
    assert len({tuple(ids(index, 3)) for index in range(4)} | {tuple(ids(0, 4)), tuple(ids(0, None))}) == 6


def test_logprobs_are_the_models() -> None:
    found = Chooser(Sampling(temperature=0, logprobs=2, bias={3: 9.0}), 0, 1).choose(LOGITS, [1])
    known = LOGITS.log_softmax(0)
    assert found.id == 3
    assert found.logprob == pytest.approx(float(known[3]))
    assert [i for i, _ in found.top] == [0, 1]
    assert [p for _, p in found.top] == pytest.approx(known[:2].tolist())


def test_processors_are_asked_and_may_leave_nothing() -> None:
    def only(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert ids.tolist() == [[1, 0]]
        return scores.masked_fill(torch.arange(5) != 4, -math.inf)

    assert Chooser(Sampling(), 0, 1, [only]).choose(LOGITS, [1, 0]).id == 4
    with pytest.raises(ServingError, match="No token"):
        Chooser(Sampling(), 0, 1, [only, lambda _, s: s - math.inf]).choose(LOGITS, [1, 0])


class Bytes:
    """A tokenizer of one byte a token."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("stops", [(), ("never", "xyz")])
def test_text_comes_in_whole_characters(stops: tuple[str, ...]) -> None:
    text, whole = Text(Bytes(), stops, b"so "), "grün → 🙂 xy never"[:-1]
    pieces = [text.add(token)[0] for token in whole.encode()] + [text.rest()]
    assert "".join(pieces) == whole
    assert not any("\ufffd" in piece for piece in pieces)
    assert Text(Bytes(), (), ()).add(0xC3) == ("", None)


def test_stop_texts_end_it_and_are_left_out() -> None:
    text, pieces = Text(Bytes(), ("END", "DEN"), ()), []
    for token in b"a E EN DEND":
        piece, stop = text.add(token)
        pieces.append(piece)
        if stop:
            break
    assert ("".join(pieces), stop) == ("a E EN ", "DEN")
    assert all(pieces[:2])


def test_requests_with_texts(tmp_path: Path, engine: Any) -> None:
    """Stop texts, ids, several answers, and a processor that fails, in the engine."""
    tokenizer = AutoTokenizer.from_pretrained(write_model(tmp_path))
    one = engine("low", tokenizer=tokenizer)
    prompt = tuple(tokenizer("abc=")["input_ids"])
    free = one.submit(ask(prompt, "low", max_tokens=12, ignore_end=True, logprobs=3)).result(60)[0]
    assert tokenizer.decode(prompt, skip_special_tokens=True) + free.text == tokenizer.decode(
        [*prompt, *free.ids], skip_special_tokens=True
    )
    assert all(token.top[0] == (token.id, pytest.approx(token.logprob)) for token in free.tokens)
    stop = free.text[3:5]
    ended = one.submit(ask(prompt, "low", max_tokens=12, ignore_end=True, stop=(stop,))).result(60)[0]
    assert ended.text == free.text[: free.text.index(stop)]
    assert (ended.end.reason, ended.end.stopped_by) == ("stop", stop)
    last = free.ids[4]
    by_id = one.submit(ask(prompt, "low", max_tokens=12, ignore_end=True, stop_ids=(last,))).result(60)[0]
    assert by_id.ids == free.ids[: free.ids.index(last) + 1]
    several = one.submit(ask(prompt, "low", temperature=1.0, seed=5, n=3)).result(60)
    assert len({tuple(answer.ids) for answer in several}) == 3
    again = one.submit(ask(prompt, "low", temperature=1.0, seed=5, n=3)).result(60)
    assert [answer.ids for answer in again] == [answer.ids for answer in several]
    assert {answer.end.cached_tokens for answer in again} == {len(prompt) - len(prompt) % 4 or 4} or len(prompt) <= 4

    def broken(ids: Any, scores: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ServingError, match="logits processor failed: ZeroDivisionError"):
        one.submit(Request(prompt, "low", processors=lambda: [broken])).result(60)
