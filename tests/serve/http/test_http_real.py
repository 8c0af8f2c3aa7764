"""The whole way, with a model: what the API answers is what the adapter says alone, and strangers break nothing."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.decoders import Fuse
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from http_servers import ASK, TOOLS, Server, ask, post
from test_http_faults import FIELDS, PLACES, VALUES

import adapterlab as al
from adapterlab.serve import Engine, EngineSettings

PROMPTS = ["1+1=", "abc", "9 0 9 0 9"]
NOTHING = {"type": "function", "function": {"name": "a"}}
ONE_OR_TWO = {"type": "function", "function": {"name": "b", "parameters": {
    "type": "object", "properties": {"n": {"$ref": "#/$defs/N"}}, "required": ["n"], "$defs": {"N": {"enum": [1, 2]}},
}}}  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_folder import write_model

    return write_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def expected(model_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Adapters in a folder, and the greedy tokens of each by `generate`."""
    root, found = tmp_path_factory.mktemp("saved"), {}
    for name, method in (
        ("base", None),
        ("low", al.LoRA(r=4)),
        ("scaled", al.IA3()),
        ("front", al.PrefixTuning(length=3)),
    ):
        model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
        if method is not None:
            host = al.attach(model, method)
            draw = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for value in host.tensors("default").values():
                    value.add_(torch.randn(value.shape, generator=draw))
            host.save(root / name)
        found[name] = [said(model, tokenizer, prompt) for prompt in PROMPTS]
    assert len({str(tokens) for tokens in found.values()}) == len(found)
    return {"root": root, "tokens": found}


def said(model: Any, tokenizer: Any, prompt: str) -> list[str]:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    new = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :]
    return [tokenizer.decode([id]) for id in new.tolist()]


@pytest.fixture(scope="module")
def real(
    make_server: Callable[..., Server], model_folder: Path, tokenizer: Any, expected: dict[str, Any]
) -> Iterator[Server]:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    settings = EngineSettings(memory_gb=0.05, max_running=16, step_tokens=64)
    made = make_server(engine=lambda: Engine(model, tokenizer, settings), root=expected["root"])
    yield made
    made.stop()


def test_each_adapter_answers_as_it_does_alone(real: Server, expected: dict[str, Any]) -> None:
    client = real.openai()
    for name, tokens in expected["tokens"].items():
        found = client.completions.create(
            model=name, prompt=PROMPTS, max_tokens=8, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
        )
        assert [choice.logprobs.tokens for choice in found.choices] == tokens, name
        assert {choice.finish_reason for choice in found.choices} == {"length"}


def test_streams_and_whole_answers_agree(real: Server) -> None:
    wish: dict[str, Any] = {"model": "low", "messages": ASK, "max_tokens": 12, "seed": 3, "n": 2, "temperature": 1.0}
    whole = real.openai().chat.completions.create(**wish)
    texts = ["", ""]
    for chunk in real.openai().chat.completions.create(**wish, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.75, "presence_penalty": -0.5},
        {"repetition_penalty": 1.8},
        {"logit_bias": {"9": 4.0, "12": -100.0}, "frequency_penalty": 1.0},
    ],
)
def test_penalties_and_log_probabilities_are_those_of_the_formulas(
    real: Server, model_folder: Path, tokenizer: Any, settings: dict[str, Any]
) -> None:
    body = {"model": "base", "prompt": "1+1=", "max_tokens": 12, "temperature": 0, "logprobs": 3, "ignore_eos": True}
    found = post(real, "/v1/completions", {**body, **settings})[1]["choices"][0]["logprobs"]
    tokens, logprobs, tops = by_hand(model_folder, tokenizer("1+1=")["input_ids"], **settings)
    assert found["tokens"] == [tokenizer.decode([id]) for id in tokens]
    assert found["token_logprobs"] == pytest.approx(logprobs, abs=1e-4)
    for told, top in zip(found["top_logprobs"], tops, strict=True):
        assert list(told.values()) == pytest.approx(top, abs=1e-4)


def by_hand(folder: Path, prompt: list[int], **settings: Any) -> tuple[list[int], list[float], list[list[float]]]:
    """Greedy tokens with penalties, their log-probabilities, and the three largest of each step."""
    model, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), list(prompt)
    logprobs, tops = [], []
    for _ in range(12):
        with torch.no_grad():
            plain = model(torch.tensor([ids])).logits[0, -1]
        scores, answer = plain.tolist(), ids[len(prompt) :]
        for id in range(len(scores)):
            if id in ids:
                penalty = settings.get("repetition_penalty", 1.0)
                scores[id] = scores[id] / penalty if scores[id] > 0 else scores[id] * penalty
            scores[id] -= settings.get("presence_penalty", 0.0) * (id in answer)
            scores[id] -= settings.get("frequency_penalty", 0.0) * answer.count(id)
            scores[id] += settings.get("logit_bias", {}).get(str(id), 0.0)
        ids.append(max(range(len(scores)), key=scores.__getitem__))
        known = plain.log_softmax(-1)
        logprobs.append(float(known[ids[-1]]))
        tops.append(known.topk(3).values.tolist())
    return ids[len(prompt) :], logprobs, tops


def test_an_engine_that_failed_is_followed_by_one_with_the_same_adapters(
    real: Server, expected: dict[str, Any]
) -> None:
    body = {"model": "low", "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    assert ask(real, "PUT", "/v1/adapters/scaled", {"pinned": True})[0] == 200
    failed = real.service.engine
    failed._worker.plan = lambda: 1 // 0  # type: ignore[assignment]
    seen: list[int] = []
    until = time.monotonic() + 20
    while 200 not in seen:  # the one that follows may be there between two requests
        seen.append(post(real, "/v1/completions", body)[0])
        assert time.monotonic() < until
    assert real.service.engine is not failed
    assert set(seen) <= {500, 503, 200}
    assert 503 in seen
    answer = post(real, "/v1/completions", body)[1]
    assert answer["choices"][0]["logprobs"]["tokens"] == expected["tokens"]["low"][0]
    assert real.service.engine.adapter("scaled").pinned
    assert ask(real, "GET", "/ready")[0] == 200


def test_a_call_that_is_required_is_one(make_server: Callable[..., Server], tmp_path: Path) -> None:
    pytest.importorskip("xgrammar")
    from tiny_folder import write_model

    folder = write_model(tmp_path / "model", more='{}":,_<')
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TOOLS
    tokenizer.backend_tokenizer.decoder = Fuse()  # no spaces between its characters
    settings = EngineSettings(memory_gb=0.05, max_running=16, step_tokens=64)
    server = make_server(engine=lambda: Engine(model, tokenizer, settings), tokenizer=tokenizer)
    create = functools.partial(
        server.openai().chat.completions.create, model="base", messages=[{"role": "user", "content": "1"}],
        tools=[NOTHING, ONE_OR_TWO], seed=1, logit_bias={str(tokenizer.convert_tokens_to_ids(" ")): -100},
    )  # fmt: skip
    for choice, names in (("required", {"a", "b"}), ({"type": "function", "function": {"name": "b"}}, {"b"})):
        answers = create(tool_choice=choice, n=8).choices
        calls = [answer.message.tool_calls[0].function for answer in answers]
        assert {call.name for call in calls} == names
        assert all(call.arguments in {"a": ["{}"], "b": ['{"n": 1}', '{"n": 2}']}[call.name] for call in calls)
        assert {(a.finish_reason, a.message.content, len(a.message.tool_calls)) for a in answers} == {
            ("tool_calls", None, 1)
        }
    cut = create(tool_choice="required", max_tokens=4).choices[0]
    assert (cut.finish_reason, cut.message.tool_calls) == ("length", None)
    stream = create(tool_choice="required", stream=True)
    calls = [call for chunk in stream for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert len(calls) == 1
    body = {"inputs": "1", "parameters": {"grammar": {"type": "json", "value": {"enum": [12, 345]}}}}
    assert post(server, "/generate", body)[1]["generated_text"].strip() in ("12", "345")
    server.stop()


def test_strangers_break_nothing(real: Server, expected: dict[str, Any]) -> None:
    draw = random.Random(1)
    for _ in range(100):
        method, path = draw.choice(PLACES)
        short = {"max_tokens": 2}
        asking = {"inputs": "1", "parameters": {"max_new_tokens": 2}}
        start = draw.choice(({}, {"messages": ASK, **short}, {"prompt": "1", **short}, asking))
        body = {**start, **{draw.choice(FIELDS): draw.choice(VALUES) for _ in range(draw.randint(1, 4))}}
        status, found, _ = ask(real, method, path, None if method == "GET" else body)
        assert status < 500, (method, path, body, found)
    body = {"model": "low", "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    answer = post(real, "/v1/completions", body)[1]
    assert answer["choices"][0]["logprobs"]["tokens"] == expected["tokens"]["low"][0]
    assert real.service.engine.failure is None


def test_answers_keep_to_a_schema(real: Server) -> None:
    pytest.importorskip("xgrammar")
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": {"enum": [12, 345]}}}
    wish = {"model": "low", "messages": ASK, "n": 8, "seed": 1, "max_tokens": 8, "response_format": form}
    status, found, _ = post(real, "/v1/chat/completions", wish)
    assert status == 200
    said = {choice["message"]["content"].replace(" ", "") for choice in found["choices"]}  # between all tokens here
    assert said <= {"12", "345"}
    assert {choice["finish_reason"] for choice in found["choices"]} == {"stop"}
    form["json_schema"]["schema"] = {"type": "no-such-type"}  # type: ignore[index]
    assert post(real, "/v1/chat/completions", {**wish, "response_format": form})[0] == 400
